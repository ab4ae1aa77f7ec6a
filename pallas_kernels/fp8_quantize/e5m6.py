"""Twelve-bit floating point (5 bits of exponent, 6 of mantissa), two numbers in three bytes.

It is float16 with its last four bits rounded away. The meaning of it, in plain `jax.numpy`.
"""

import jax.numpy as jnp
from jax import lax

LARGEST = 65024.0
_DROPPED = 13 + 4  # Bits of a float32 mantissa that E5M6 lacks.
_SMALLEST_NORMAL = 2.0**-14
_SUBNORMAL_STEP = 2.0**-20


def pack(x):
    """`[..., k]` to `uint8[..., k * 3 / 2]`, rounding to nearest even straight from float32."""
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = bits + ((1 << (_DROPPED - 1)) - 1) + ((bits >> _DROPPED) & 1)
    rounded = lax.bitcast_convert_type(rounded & -(1 << _DROPPED), jnp.float32)
    subnormal = jnp.round(x / _SUBNORMAL_STEP) * _SUBNORMAL_STEP
    rounded = jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, subnormal, rounded)
    rounded = jnp.where(jnp.isfinite(x), rounded, x)  # The carry must not turn a NaN into something else.
    half = lax.bitcast_convert_type(rounded.astype(jnp.float16), jnp.uint16) >> 4
    half = jnp.where(jnp.isnan(x), jnp.uint16(0x7FF), half)
    first, second = half[..., 0::2], half[..., 1::2]
    three = jnp.stack([first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4], axis=-1)
    return three.astype(jnp.uint8).reshape(*x.shape[:-1], -1)


def unpack(packed):
    """The inverse, in float16."""
    three = packed.reshape(*packed.shape[:-1], -1, 3).astype(jnp.uint16)
    first = three[..., 0] | ((three[..., 1] & 0xF) << 8)
    second = (three[..., 1] >> 4) | (three[..., 2] << 4)
    half = jnp.stack([first, second], axis=-1).reshape(*packed.shape[:-1], -1) << 4
    return lax.bitcast_convert_type(half, jnp.float16)

"""Rotary position embedding (arXiv 2104.09864) and its extension to long context, YaRN (arXiv 2309.00071)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import RopeConfig

Rotation = tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]


def frequencies(config: RopeConfig, dim: int) -> Float[np.ndarray, " half"]:
    """Radians a position for each of the `dim / 2` pairs, in float64.

    Plain RoPE gives `theta ** (-2i / dim)`. YaRN keeps the pairs that turn more than `beta_fast` times
    over the original context, divides those that turn less than `beta_slow` times by the factor, and
    ramps linearly between (YaRN §3.2, eqs 22-23).
    """
    plain = config.theta ** (-np.arange(0, dim, 2) / dim)
    if config.yarn_factor == 1.0:
        return plain

    def pair_that_turns(times: float) -> float:
        return dim * math.log(config.yarn_original_len / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_that_turns(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.yarn_beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - ramp) + plain / config.yarn_factor * ramp


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: RopeConfig, d_qk: int) -> float:
    """`d_qk ** -0.5`, times YaRN's `mscale ** 2` (DeepSeek-V3's `mscale_all_dim`)."""
    return d_qk**-0.5 * _mscale(config.yarn_factor, config.yarn_mscale_all_dim) ** 2


def rotation(config: RopeConfig, dim: int, positions: Int[Array, "batch seq"]) -> Rotation:
    """Cosine and sine of every pair at every position, float32, with YaRN's amplitude."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(config, dim), jnp.float32)
    amplitude = _mscale(config.yarn_factor, config.yarn_mscale) / _mscale(
        config.yarn_factor, config.yarn_mscale_all_dim
    )
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(
    x: Float[Array, "batch seq *heads dim"], turn: Rotation, interleaved: bool
) -> Float[Array, "batch seq *heads dim"]:
    """Turns the pairs of x: (x0,x1),(x2,x3)... when `interleaved`, else (x_i, x_{i+dim/2})."""
    cos, sin = turn
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    wide = x.astype(jnp.float32)
    if interleaved:
        pairs = wide.reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = jnp.stack(turned, -1).reshape(x.shape) if interleaved else jnp.concatenate(turned, -1)
    return out.astype(x.dtype)

"""The meaning of FP8 quantisation, in plain `jax.numpy`."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8_quantize import e5m6

TILE = 128
SMALLEST_SCALE = 2.0**-100  # Clear of subnormals, which some hardware flushes, as its inverse is.


def scale_and_inverse(amax, largest: float, power_of_two: bool):
    """The scale of a tile, and what its elements are multiplied by."""
    scale = jnp.maximum(amax * (1 / largest), SMALLEST_SCALE)
    if not power_of_two:
        return scale, jnp.minimum(largest / jnp.maximum(amax, SMALLEST_SCALE), 1 / SMALLEST_SCALE)
    # Up to the next power of two: carry out of the mantissa. The inverse flips the exponent, exactly.
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    bits = (bits + 0x007FFFFF) & 0x7F800000
    up = lax.bitcast_convert_type(bits, jnp.float32)
    inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    finite = amax < jnp.inf
    return jnp.where(finite, up, jnp.nan), jnp.where(finite, inverse, jnp.nan)


def _largest(x, axis=None, keepdims=False):
    """Largest magnitude, float32; NaN where there is one.

    Over bits, in the order of magnitudes with NaN last: XLA's maximum of floats drops NaNs on a CPU.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=keepdims), jnp.float32)


def padded_rows(rows: int, groups: int | None = None) -> int:
    """Rows of a transposed operand: each group padded to a multiple of 128, whatever the sizes."""
    return -(-rows // TILE) * TILE if groups is None else (rows // TILE + groups) * TILE


def _tiles(x):
    """`[..., k]` to `[..., ceil(k/128), 128]`, filled up with zeros."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)])
    return x.reshape(*x.shape[:-1], -1, TILE)


def rows(x, *, power_of_two, dtype, swiglu=False, per_tensor=False):
    """Values `[rows, k]` and scales `[k/128, rows]`."""
    x = x.astype(jnp.float32)
    if swiglu:
        gate, up = jnp.split(x, 2, axis=1)
        x = jax.nn.silu(gate) * up
    largest = float(jnp.finfo(dtype).max)
    if per_tensor:
        scale, inverse = scale_and_inverse(_largest(x), largest, power_of_two)
        return (x * inverse).astype(dtype), jnp.full((-(-x.shape[1] // TILE), x.shape[0]), scale)
    values, scales = scaled_rows(x, largest, power_of_two=power_of_two)
    return values.astype(dtype), scales


def scaled_rows(x, largest: float, *, power_of_two):
    """1x128 tiles divided by the scale that maps their largest magnitude to `largest`; and the scales."""
    tiles = _tiles(x)
    scale, inverse = scale_and_inverse(_largest(tiles, axis=-1), largest, power_of_two)
    return (tiles * inverse[..., None]).reshape(x.shape[0], -1)[:, : x.shape[1]], scale.T


def row_blocks(group_sizes, rows: int):
    """For every 128 rows of the padded operand: its first row in the original, and its group's share."""
    if group_sizes is None:
        start = jnp.arange(0, rows, TILE, dtype=jnp.int32)
        return jnp.stack([start, jnp.minimum(rows - start, TILE)], axis=1)
    blocks = -(-group_sizes // TILE)
    ends, last = jnp.cumsum(group_sizes), jnp.cumsum(blocks)
    block = jnp.arange(padded_rows(rows, group_sizes.shape[0]) // TILE)
    group = jnp.sum(block[:, None] >= last[None, :], axis=1)
    at = jnp.minimum(group, group_sizes.shape[0] - 1)
    start = (ends - group_sizes)[at] + (block - (last - blocks)[at]) * TILE
    valid = jnp.where(group < group_sizes.shape[0], jnp.clip(ends[at] - start, 0, TILE), 0)
    return jnp.stack([jnp.where(valid > 0, start, 0), valid], axis=1).astype(jnp.int32)


def columns(x, group_sizes, *, power_of_two, dtype, per_tensor=False):
    """Values `[k, padded]` and scales `[padded/128, k]`."""
    if isinstance(x, tuple):
        x = dequantize(*x)
    x = x.astype(jnp.float32)
    options = dict(power_of_two=power_of_two, dtype=dtype)
    if not per_tensor:
        return rows(_padded_groups(x, group_sizes).T, **options)
    # Quantised where it lies: then a quarter of the bytes is moved.
    if group_sizes is not None:
        x = jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes), x, 0)
    values, scales = rows(x, per_tensor=True, **options)
    codes = _padded_groups(lax.bitcast_convert_type(values, jnp.uint8), group_sizes).T
    scales = jnp.full((codes.shape[1] // TILE, codes.shape[0]), scales[0, 0])
    return lax.bitcast_convert_type(codes, dtype), scales


def _padded_groups(x, group_sizes):
    """`[rows, k]` to `[padded, k]`: every group filled up with zeros."""
    start, valid = row_blocks(group_sizes, x.shape[0]).T
    row = start[:, None] + jnp.arange(TILE)
    inside = jnp.arange(TILE) < valid[:, None]
    tiles = jnp.where(inside[..., None], x[jnp.minimum(row, x.shape[0] - 1)], 0)
    return tiles.reshape(-1, x.shape[1])


def blocks(w, *, power_of_two, dtype, transpose=False, per_tensor=False):
    """Values like `w` and scales `[..., rows/128, k/128]`; of the transposed `w` if `transpose`."""
    w = w.astype(jnp.float32)
    *stack, n, k = w.shape
    padded = jnp.pad(w, [(0, 0)] * len(stack) + [(0, -n % TILE), (0, -k % TILE)])
    tiles = padded.reshape(*stack, -(-n // TILE), TILE, -(-k // TILE), TILE)
    # Two reductions, which the barrier keeps apart: XLA reads rows well, and blocks badly.
    amax = _largest(lax.optimization_barrier(_largest(tiles, axis=-1)), axis=-2)
    if per_tensor:
        amax = jnp.broadcast_to(_largest(amax, axis=(-2, -1), keepdims=True), amax.shape)
    scale, inverse = scale_and_inverse(amax, float(jnp.finfo(dtype).max), power_of_two)
    values = (tiles * inverse[..., :, None, :, None]).reshape(padded.shape)[..., :n, :k]
    values = values.astype(dtype)
    return (values.swapaxes(-1, -2), scale.swapaxes(-1, -2)) if transpose else (values, scale)


def dequantize(values, scales):
    """Values times scales, float32."""
    n, k = values.shape[-2:]
    blocks_of_k = -(-k // TILE)
    if values.ndim == 2 and scales.shape == (blocks_of_k, n):
        scale = jnp.repeat(scales.T, TILE, axis=1)[:, :k]
    elif scales.shape == (*values.shape[:-2], -(-n // TILE), blocks_of_k):
        scale = jnp.repeat(jnp.repeat(scales, TILE, axis=-2)[..., :n, :], TILE, axis=-1)[..., :k]
    else:
        raise ValueError(
            f"scales {scales.shape} do not fit values {values.shape}: expected {(blocks_of_k, n)}, one for"
            " each row and 128 columns, or"
            f" {(*values.shape[:-2], -(-n // TILE), blocks_of_k)}, one for each 128x128 block"
        )
    return values.astype(jnp.float32) * scale


def pack_e5m6(x, *, scaled):
    """`[..., k]` to uint8 `[..., k * 3 / 2]`; of `[rows, k]`, if scaled, scales `[ceil(k/128), rows]` too."""
    if not scaled:
        return e5m6.pack(x), None
    x, scales = scaled_rows(x.astype(jnp.float32), e5m6.LARGEST, power_of_two=True)
    return e5m6.pack(x), scales


def unpack_e5m6(values, scales, *, dtype):
    """The numbers of `pack_e5m6`, times their scales if there are any."""
    numbers = e5m6.unpack(values)
    return (numbers if scales is None else dequantize(numbers, scales)).astype(dtype)

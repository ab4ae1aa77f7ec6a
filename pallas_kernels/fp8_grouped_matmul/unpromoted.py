"""FP8 products that the tensor cores sum over the whole contraction, in the 14 bits that they keep.

What DeepSeek-V3's recipe avoids (arXiv 2412.19437, section 3.3.2), to measure what it would cost. The scales
must not change along the contraction: the first ones are applied to the result.
"""

import jax.numpy as jnp

from pallas_kernels.fp8_grouped_matmul import mosaic_gpu, mosaic_gpu_wgrad
from pallas_kernels.fp8_quantize import TILE


def dense(lhs, rhs, *, out_dtype):
    """`lhs @ rhs.T`, `rhs` with block scales or with row scales."""
    n, k = rhs.values.shape
    by_block = rhs.scales.shape == (-(-n // TILE), -(-k // TILE))
    kernel = mosaic_gpu.dense if by_block else mosaic_gpu_wgrad.dense
    sums = kernel(lhs, rhs, out_dtype=jnp.float32, promote=False)
    columns = jnp.repeat(rhs.scales[:, 0], TILE)[:n] if by_block else rhs.scales[0]
    return (sums * lhs.scales[0][:, None] * columns).astype(out_dtype)


def forward(lhs, rhs, group_sizes, *, out_dtype):
    """`out[r] = lhs[r] @ rhs[group of r].T`."""
    sums = mosaic_gpu.forward(lhs, rhs, group_sizes, out_dtype=jnp.float32, promote=False)
    groups, n, _ = rhs.values.shape
    columns = jnp.repeat(rhs.scales[:, :, 0], TILE, axis=1)[:, :n]
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(sums)), side="right")
    scaled = sums * lhs.scales[0][:, None] * columns[jnp.minimum(group, groups - 1)]
    return scaled.astype(out_dtype)


def wgrad(lhs, rhs, group_sizes, *, out_dtype):
    """`out[g] = lhs[:, rows of g] @ rhs[:, rows of g].T`, one scale for all of `lhs` and one for `rhs`."""
    sums = mosaic_gpu.wgrad(lhs, rhs, group_sizes, out_dtype=jnp.float32, promote=False)
    return (sums * lhs.scales[0][:, None] * rhs.scales[0]).astype(out_dtype)

"""`fp8_matmul` for TPU: the grouped kernels with one group."""

import jax.numpy as jnp

from pallas_kernels.fp8_grouped_matmul import mosaic_tpu
from pallas_kernels.fp8_quantize import TILE, Quantized

native = mosaic_tpu.native
unsupported = mosaic_tpu.unsupported


def matmul(lhs, rhs, *, out_dtype, multiply_fp8: bool | None = None, interpret=False):
    """`lhs @ rhs.T`, `rhs` with block scales or with row scales; `multiply_fp8` overrides what is known."""
    options = dict(out_dtype=out_dtype, multiply_fp8=multiply_fp8, interpret=interpret)
    (n, k), steps = rhs.values.shape, -(-rhs.values.shape[1] // TILE)
    if rhs.scales.shape == (-(-n // TILE), steps):
        return mosaic_tpu.dense(lhs, rhs, **options)
    left, right = (Quantized(jnp.pad(x.values, ((0, 0), (0, -k % TILE))), x.scales) for x in (lhs, rhs))
    return mosaic_tpu.wgrad(left, right, jnp.asarray([k]), **options)[0]

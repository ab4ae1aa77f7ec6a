"""The FP8 grouped products with FP8 as storage only: dequantised to bfloat16, then `grouped_matmul`.

Exact where the scales are powers of two; otherwise see `fp8_matmul.bf16`.
"""

import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.fp8_quantize import TILE, dequantize
from pallas_kernels.grouped_matmul import blocked, grouped_matmul, mosaic_tpu


def unsupported(lhs, rhs) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs
    return None


def forward(lhs, rhs, group_sizes, *, out_dtype):
    """`out[r] = lhs[r] @ rhs[group of r].T`."""
    left, right = dequantize(lhs, jnp.bfloat16), dequantize(rhs, jnp.bfloat16)
    return grouped_matmul(left, right, group_sizes, transpose_rhs=True, out_dtype=out_dtype)


def wgrad(lhs, rhs, group_sizes, *, out_dtype):
    """`out[g] = lhs[:, rows of g] @ rhs[:, rows of g].T`."""
    module = mosaic_tpu if implementations.platform() == "tpu" else blocked
    left, right = dequantize(lhs, jnp.bfloat16).T, dequantize(rhs, jnp.bfloat16).T
    padded_sizes = (-(-group_sizes // TILE) * TILE).astype(jnp.int32)
    return module.wgrad(left, right, padded_sizes, out_dtype=out_dtype)

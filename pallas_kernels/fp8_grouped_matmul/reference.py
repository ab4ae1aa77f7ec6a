"""The meaning of the FP8 grouped products: dequantise, and take the float32 `grouped_matmul`."""

import jax.numpy as jnp

from pallas_kernels.fp8_quantize import TILE, dequantize
from pallas_kernels.grouped_matmul import blocked


def unsupported(lhs, rhs) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs
    return None


def forward(lhs, rhs, group_sizes, *, out_dtype):
    """`out[r] = lhs[r] @ rhs[group of r].T`."""
    return blocked.forward(
        dequantize(lhs), dequantize(rhs), group_sizes, transpose_rhs=True, out_dtype=out_dtype
    )


def wgrad(lhs, rhs, group_sizes, *, out_dtype):
    """`out[g] = lhs[:, rows of g] @ rhs[:, rows of g].T`."""
    padded_sizes = -(-group_sizes // TILE) * TILE
    return blocked.wgrad(
        dequantize(lhs).T, dequantize(rhs).T, padded_sizes.astype(jnp.int32), out_dtype=out_dtype
    )

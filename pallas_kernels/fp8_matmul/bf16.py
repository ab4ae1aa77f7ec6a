"""`fp8_matmul` with FP8 as storage only: operands are dequantised to bfloat16, and multiplied so.

Exact where the scales are powers of two. Otherwise a number times its scale is rounded to 8 bits, an error of
2^-9 beside the 2^-4 of E4M3 itself.
"""

import jax.numpy as jnp

from pallas_kernels.fp8_quantize import dequantize


def unsupported(lhs, rhs) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs
    return None


def matmul(lhs, rhs, *, out_dtype):
    """`lhs @ rhs.T`."""
    left, right = dequantize(lhs, jnp.bfloat16), dequantize(rhs, jnp.bfloat16)
    return jnp.matmul(left, right.T, preferred_element_type=jnp.float32).astype(out_dtype)

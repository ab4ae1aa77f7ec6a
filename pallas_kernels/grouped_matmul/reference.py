"""The meaning of `grouped_matmul`: `jax.lax.ragged_dot`, which XLA knows on every platform.

XLA on CPU and GPU multiplies every row by every group and masks, so the cost is rows x groups.
"""

import jax
import jax.numpy as jnp


def unsupported(lhs, rhs, transpose_rhs) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs, transpose_rhs
    return None


def forward(lhs, rhs, group_sizes, *, transpose_rhs, out_dtype):
    """`out[r] = lhs[r] @ rhs[group of r]`."""
    if transpose_rhs:
        rhs = rhs.swapaxes(1, 2)
    out = jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)
    return out.astype(out_dtype)


def wgrad(lhs, dout, group_sizes, *, out_dtype):
    """`out[g] = lhs[rows of g].T @ dout[rows of g]`: the rows are the ragged contraction."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    out = jax.lax.ragged_dot_general(lhs, dout, group_sizes, dims, preferred_element_type=jnp.float32)
    return out.astype(out_dtype)

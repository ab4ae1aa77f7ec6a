"""The meaning of `gather_matvec`: the matrices gathered, one product a row."""

import jax.numpy as jnp


def unsupported(lhs, rhs, indices) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs, indices
    return None


def product(lhs, rhs, indices, rows_alike):
    """`out[i] = lhs[i] @ rhs[indices[i]]` in float32."""
    del rows_alike
    if rhs.shape[0] == 1:
        return jnp.matmul(lhs, rhs[0], preferred_element_type=jnp.float32)
    return jnp.einsum("rk,rkn->rn", lhs, rhs[indices], preferred_element_type=jnp.float32)

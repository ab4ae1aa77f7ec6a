"""The meaning of `gather_matvec`: the matrices gathered, one product a row."""

import jax.numpy as jnp


def unsupported(lhs, rhs, indices) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs, indices
    return None


def product(lhs, rhs, indices, each, alike):
    """`out[i] = lhs[i // each] @ rhs[indices[i]]` in float32."""
    del alike
    lhs = jnp.repeat(lhs, each, axis=0)[: len(indices)]
    if rhs.shape[0] == 1:
        return jnp.matmul(lhs, rhs[0], preferred_element_type=jnp.float32)
    return jnp.einsum("rk,rkn->rn", lhs, rhs[indices], preferred_element_type=jnp.float32)

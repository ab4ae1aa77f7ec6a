"""`gather_matvec` in plain JAX, row by row: a slice of the matrices and a product."""

import jax.numpy as jnp
from jax import lax


def unsupported(lhs, rhs, indices) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del lhs, rhs, indices
    return None


def product(lhs, rhs, indices, each, alike):
    """`out[i] = lhs[i // each] @ rhs[indices[i]]` in float32."""
    del alike
    rows = []
    for row in range(len(indices)):
        matrix = rhs[0] if rhs.shape[0] == 1 else lax.dynamic_index_in_dim(rhs, indices[row], keepdims=False)
        rows.append(
            jnp.matmul(lhs[row // each : row // each + 1], matrix, preferred_element_type=jnp.float32)
        )
    return jnp.concatenate(rows)

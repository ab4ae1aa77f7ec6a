"""Products with the weights of a layer: for few rows by kernels that do little but read the weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import implementations
from pallas_kernels.gather_matvec import gather_matvec, mosaic_gpu

# Beyond so many tokens the general product is taken: more rows of one matrix want the tensor cores.
FEW = 4


def _has_kernel(rows: Array, matrices: Array, each: Array) -> bool:
    return implementations.on_one_device() and mosaic_gpu.unsupported(rows, matrices, each) is None


def linear(
    x: Float[Array, "*batch k"], w: Float[Array, "k n"], *, wide: bool = False
) -> Float[Array, "*batch n"]:
    """`x @ w` in the dtype of x, or in float32 if `wide`."""
    dtype = jnp.float32 if wide else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    each = jnp.zeros(len(rows), jnp.int32)
    if len(rows) <= FEW and _has_kernel(rows, w[None], each):
        return gather_matvec(rows, w[None], each).reshape(*x.shape[:-1], -1).astype(dtype)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def per_head(
    x: Float[Array, "batch seq heads k"], w: Float[Array, "heads k n"]
) -> Float[Array, "batch seq heads n"]:
    """Each head's vector times its own matrix, in the dtype of x."""
    batch, seq, heads, k = x.shape
    rows, each = x.reshape(-1, k), jnp.tile(jnp.arange(heads), batch * seq)
    if batch * seq <= FEW and _has_kernel(rows, w, each):
        return gather_matvec(rows, w, each).reshape(batch, seq, heads, -1).astype(x.dtype)
    return jnp.einsum("bshk,hkn->bshn", x, w)

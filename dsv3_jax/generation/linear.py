"""Products with the weights of a layer: for few rows by kernels that do little but read the weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import implementations
from pallas_kernels.gather_matvec import gather_matvec, mosaic_gpu
from pallas_kernels.implementations import FEW_TOKENS


def _has_kernel(rows: Array, matrices: Array, each: Array) -> bool:
    return implementations.on_one_device() and mosaic_gpu.unsupported(rows, matrices, each) is None


def linear(
    x: Float[Array, "*batch k"], w: Float[Array, "k n"], *, wide: bool = False
) -> Float[Array, "*batch n"]:
    """`x @ w` in the dtype of x, or in float32 if `wide`."""
    dtype = jnp.float32 if wide else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    each = jnp.zeros(len(rows), jnp.int32)
    # More rows of one matrix want the tensor cores.
    if len(rows) <= FEW_TOKENS and _has_kernel(rows, w[None], each):
        return gather_matvec(rows, w[None], each, rows_alike=1).reshape(*x.shape[:-1], -1).astype(dtype)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def per_head(
    x: Float[Array, "batch seq heads k"], w: Float[Array, "heads k n"]
) -> Float[Array, "batch seq heads n"]:
    """Each head's vector times its own matrix, in the dtype of x."""
    batch, seq, heads, k = x.shape
    rows, each = x.reshape(-1, k), jnp.tile(jnp.arange(heads), batch * seq)
    if batch * seq <= FEW_TOKENS and _has_kernel(rows, w, each):
        found = gather_matvec(rows, w, each, rows_alike=heads)
        return found.reshape(batch, seq, heads, -1).astype(x.dtype)
    return jnp.einsum("bshk,hkn->bshn", x, w)


def in_float32(x: Float[Array, "batch seq k"], w: Float32[Array, "n k"]) -> Float32[Array, "batch seq n"]:
    """`x @ w.T` in float32."""
    x = x.astype(jnp.float32)
    if x.shape[0] * x.shape[1] <= FEW_TOKENS and implementations.platform() == "gpu":
        # A sum over rows; how a library adds up a product depends on how many there are.
        return (x[..., None, :] * w).sum(-1)
    return jnp.einsum("bsk,nk->bsn", x, w, precision=jax.lax.Precision.HIGHEST)

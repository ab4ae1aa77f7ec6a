"""Products with the weights of a layer: for few rows by kernels that do little but read the weights.

On a GPU the tokens of a step, if they are few, are the first of `FEW_TOKENS` rows, followed by zeros. So what
adds up along a row (`alike`) has the same shape however many tokens come together, the compiler makes the
same of it, and a token finds the same to the bit. Only the products with weights, attention and the cache
leave the zeros out: they are told how many rows are `real` tokens.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import implementations
from pallas_kernels.gather_matvec import gather_matvec, mosaic_gpu
from pallas_kernels.implementations import FEW_TOKENS

# For programs of generation: roundings are where they are written. Else the compiler leaves some out where it
# fuses, and a step of two tokens may not be fused as one of one is.
AS_WRITTEN = {"xla_allow_excess_precision": False}


def real_tokens(batch: int, seq: int) -> int | None:
    """How many of `FEW_TOKENS` rows the tokens of a step are; None if they stay as they are."""
    few = batch * seq <= FEW_TOKENS and implementations.platform() == "gpu"
    return batch * seq if few else None


def as_rows(x: Array, real: int | None) -> Array:
    """`x`, whose first dimensions count `real` tokens, as `[FEW_TOKENS, 1, all of each]`; itself for None."""
    if real is None:
        return x
    return jnp.pad(x.reshape(real, 1, -1), ((0, FEW_TOKENS - real), (0, 0), (0, 0)))


def alike(f: Callable[..., Any], real: int | None, x: Array, *constants: Any) -> Any:
    """`f(x, *constants)`, fused with nothing before or after it where `real` tokens are some of the rows."""
    if real is None:
        return f(x, *constants)
    return lax.optimization_barrier(f(lax.optimization_barrier(x), *constants))


def _has_kernel(rows: Array, matrices: Array, indices: Array) -> bool:
    return implementations.on_one_device() and mosaic_gpu.unsupported(rows, matrices, indices) is None


def linear(
    x: Float[Array, "*batch k"], w: Float[Array, "k n"], real: int | None = None, *, wide: bool = False
) -> Float[Array, "*batch n"]:
    """`x @ w` in the dtype of x, or in float32 if `wide`; zero for rows after the `real` ones."""
    dtype = jnp.float32 if wide else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    only = jnp.zeros(real or len(rows), jnp.int32)
    # More rows of one matrix want the tensor cores.
    if len(rows) <= FEW_TOKENS and _has_kernel(rows, w[None], only):
        found = as_rows(gather_matvec(rows, w[None], only, alike=1), real)
        return found.reshape(*x.shape[:-1], -1).astype(dtype)
    return jnp.matmul(x, w, preferred_element_type=dtype)


def per_head(
    x: Float[Array, "batch seq heads k"], w: Float[Array, "heads k n"], real: int | None = None
) -> Float[Array, "batch seq heads n"]:
    """Each head's vector times its own matrix, in the dtype of x; zero for rows after the `real` ones."""
    *tokens, heads, k = x.shape
    rows = x.reshape(-1, k)
    count = len(rows) // heads
    head = jnp.tile(jnp.arange(heads), real or count)
    if count <= FEW_TOKENS and _has_kernel(rows, w, head):
        found = as_rows(gather_matvec(rows, w, head, alike=heads), real)
        return found.reshape(*tokens, heads, -1).astype(x.dtype)
    return jnp.einsum("bshk,hkn->bshn", x, w)

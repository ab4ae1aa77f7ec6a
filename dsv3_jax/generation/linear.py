"""Products with the weights of a layer, in which a token finds the same to the bit with drafts as without.

Arithmetic rounds by shapes: a product of 32 rows may add up in another order than one of 64. So a model that
can draft decodes in arrays of one shape, `Rows`, whether drafts come along or not: the tokens of a step are
the first rows, zeros the others. What adds up along a row then has the same shape in both programs, `alike`
keeps it from being fused with what has not, and the compiler makes the same of it. Only kernels that compute
each row as if it were alone leave the zeros out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from pallas_kernels import implementations
from pallas_kernels.gather_matvec import gather_matvec, mosaic_gpu

# Products of up to so many rows, or sequences, are bound by reading the matrix: the tensor cores do not help.
FEW = 4


class Rows(NamedTuple):
    """How the tokens of a step are laid out: static.

    Attributes:
      real: the tokens, sequence by sequence.
      total: rows in all: as many as the model can read in a step, each sequence's newest token and a draft of
        every depth. Zeros follow the tokens.
      few: whether kernels for few rows multiply; by the number of sequences, which drafts do not change.
    """

    real: int
    total: int
    few: bool


def rows_of(batch: int, seq: int, config: ModelConfig, dtype: jnp.dtype) -> Rows | None:
    """The layout of `seq` tokens of each sequence; None if they stay `[batch, seq]`.

    So they do in float32 on a CPU or TPU: there another order of sums changes logits by some 1e-6, and a text
    only where two tokens are as near.
    """
    most = config.mtp.depth + 1
    exact = dtype == jnp.float32 and implementations.platform() != "gpu"
    if exact or most == 1 or seq > most:
        return None
    return Rows(batch * seq, batch * most, batch <= FEW)


def as_rows(x: Array, rows: Rows | None) -> Array:
    """`x`, whose first dimensions count the real tokens, as `[total, 1, all of each]`; itself for None."""
    if rows is None:
        return x
    return jnp.pad(x.reshape(rows.real, 1, -1), ((0, rows.total - rows.real), (0, 0), (0, 0)))


def alike(f: Callable[..., Any], rows: Rows | None, x: Array, *constants: Any) -> Any:
    """`f(x, *constants)`, fused with nothing before or after it where tokens are some of the rows."""
    if rows is None:
        return f(x, *constants)
    return lax.optimization_barrier(f(lax.optimization_barrier(x), *constants))


def _has_kernel(rows: Array, matrices: Array, indices: Array) -> bool:
    return implementations.on_one_device() and mosaic_gpu.unsupported(rows, matrices, indices) is None


def linear(
    x: Float[Array, "*batch k"], w: Float[Array, "k n"], rows: Rows | None = None, *, wide: bool = False
) -> Float[Array, "*batch n"]:
    """`x @ w` in the dtype of x, or in float32 if `wide`; rows after the real ones are of no use."""
    dtype = jnp.float32 if wide else x.dtype
    flat = x.reshape(-1, x.shape[-1])
    only = jnp.zeros(rows.real if rows else len(flat), jnp.int32)
    few = rows.few if rows else len(flat) <= FEW
    if few and _has_kernel(flat, w[None], only):
        found = as_rows(gather_matvec(flat, w[None], only, alike=1), rows)
        return found.reshape(*x.shape[:-1], -1).astype(dtype)
    return alike(lambda x, w: jnp.matmul(x, w, preferred_element_type=dtype), rows, x, w)


def per_head(
    x: Float[Array, "batch seq heads k"], w: Float[Array, "heads k n"], rows: Rows | None = None
) -> Float[Array, "batch seq heads n"]:
    """Each head's vector times its own matrix, in the dtype of x; otherwise as `linear`."""
    *tokens, heads, k = x.shape
    flat = x.reshape(-1, k)
    count = len(flat) // heads
    head = jnp.tile(jnp.arange(heads), rows.real if rows else count)
    few = rows.few if rows else count <= FEW
    if few and _has_kernel(flat, w, head):
        found = as_rows(gather_matvec(flat, w, head, alike=heads), rows)
        return found.reshape(*tokens, heads, -1).astype(x.dtype)
    return alike(lambda x, w: jnp.einsum("bshk,hkn->bshn", x, w), rows, x, w)

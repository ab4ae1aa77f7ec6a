"""Experts' weights that the replicas split, put together for the kernels that multiply by them.

The partitioner gathers what XLA multiplies itself, but has to give a kernel under `shard_map` what its
in_specs say. Gathered there, layer by layer beside other work, weights travel in the dtype of computation,
half the bytes of the float32 that is stored, while their gradients are summed in float32 and arrive split: no
replica ever holds a whole sum.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float

from dsv3_jax.parallel.mesh import ExpertLayout

AXIS = "data"
KEPT = "gathered_weights"  # The name by which remat policies know them.


def whole(part: Float[Array, "..."], layout: ExpertLayout, dtype: DTypeLike) -> Float[Array, "..."]:
    """The weights that ranks of `data` hold parts of, in `dtype`; as they are where no part is split off.

    Runs inside a `shard_map` over at least `data`, whose in_spec for `part` is `layout.spec`.
    """
    for dim, axes in enumerate(layout.spec):
        if axes is not None and AXIS in axes:  # The innermost axis there: parts lie one after the other.
            gathered: Any = _gather(part, dim, dtype)
            return checkpoint_name(gathered, KEPT) if layout.kept else gathered
    return part


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: Float[Array, "..."], dim: int, dtype: DTypeLike) -> Float[Array, "..."]:
    return lax.all_gather(part.astype(dtype), AXIS, axis=dim, tiled=True)


def _gather_fwd(part, dim, dtype):
    return _gather(part, dim, dtype), part[:0]  # Nothing but the dtype.


def _gather_bwd(dim, dtype, like, gradient):
    return (lax.psum_scatter(gradient.astype(like.dtype), AXIS, scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_fwd, _gather_bwd)

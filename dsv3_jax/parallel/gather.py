"""Weights that the replicas split, put together for what multiplies by them, and their gradients summed.

The partitioner gathers what XLA multiplies itself, but has to give a kernel under `shard_map` what its
in_specs say. Gathered there, layer by layer beside other work, weights travel in the dtype of computation,
half the bytes of the float32 that is stored, while their gradients are summed in float32 and arrive split:
no replica ever holds a whole sum. So are those of embedding and head: left to itself the partitioner sums the
head's with every chunk of the loss, and XLA sends the embedding's whole, together with the sums of the loss.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, Int

from dsv3_jax.parallel.mesh import (
    LOGICAL_AXES,
    ExpertLayout,
    constrain,
    current_mesh,
    gradient_layout,
    spec,
)

AXIS = "data"
KEPT = "gathered_weights"  # The name by which remat policies know them.


def whole(part: Float[Array, "..."], layout: ExpertLayout, dtype: DTypeLike) -> Float[Array, "..."]:
    """The weights that ranks of `data` hold parts of, in `dtype`; as they are where no part is split off.

    Runs inside a `shard_map` over at least `data`, whose in_spec for `part` is `layout.spec`.
    """
    for dim, axes in enumerate(layout.spec):
        if axes is not None and AXIS in axes:  # The innermost axis there: parts lie one after the other.
            gathered: Any = _gather(part, dim, dtype, layout.travels)
            return checkpoint_name(gathered, KEPT) if layout.kept else gathered
    return part


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: Float[Array, "..."], dim: int, dtype: DTypeLike, travels: str) -> Float[Array, "..."]:
    return lax.all_gather(part.astype(dtype), AXIS, axis=dim, tiled=True)


def _gather_fwd(part, dim, dtype, travels):
    return _gather(part, dim, dtype, travels), part[:0]  # Nothing but the dtype.


def _gather_bwd(dim, dtype, travels, like, gradient):
    return (summed_part(gradient.astype(like.dtype), (AXIS,), dim, travels),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def summed_part(
    addend: Float[Array, "..."], axes: tuple[str, ...], dim: int, travels: DTypeLike
) -> Float[Array, "..."]:
    """The sum over `axes` of the mesh, in the dtype of `addend`; each device keeps its part along `dim`.

    Sent in a narrower dtype each addend is rounded once: parts are exchanged as they are and added up where
    they arrive. That is as many bytes as a reduce-scatter, which would round at every hop.
    """
    if jnp.dtype(travels).itemsize >= addend.dtype.itemsize:
        return lax.psum_scatter(addend, axes, scatter_dimension=dim, tiled=True)
    n, shape = lax.axis_size(axes), addend.shape
    parts = addend.astype(travels).reshape(*shape[:dim], n, shape[dim] // n, *shape[dim + 1 :])
    arrived = lax.all_to_all(jnp.moveaxis(parts, dim, 0), axes, split_axis=0, concat_axis=0)
    return arrived.sum(0, dtype=addend.dtype)


def summed(addend: Float[Array, "..."]) -> Float[Array, "..."]:
    """The gradient of what is no expert's, summed over all devices of the batch and split as its moments are.

    Runs inside a `shard_map` whose out_spec for it is that of `gradient_layout`.
    """
    layout, travels = gradient_layout(addend.shape)
    rest = LOGICAL_AXES["batch"]
    for dim, axes in enumerate(layout):
        if axes is not None:
            over = (axes,) if isinstance(axes, str) else tuple(axes)
            addend = summed_part(addend, over, dim, travels)
            rest = tuple(name for name in rest if name not in over)
    return lax.psum(addend, rest) if rest else addend


def look_up(
    table: Float[Array, "vocab d"], ids: list[Int[Array, "batch seq"]], dtype: DTypeLike
) -> list[Float[Array, "batch seq d"]]:
    """Rows of a table for each of `ids`, in `dtype`; the table's gradient is summed in float32, and once.

    In bf16 the gradient of a frequent token, a sum of very many terms, would lose them.
    """
    if current_mesh() is None:
        return [table[rows].astype(dtype) for rows in ids]
    return list(_look_up(table, jnp.stack(ids), table.shape, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table: Array, ids: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    # Whole before the look-up: from a table split over `d` the partitioner would split the result the same
    # way, and then gather the batch to split it again.
    return constrain(constrain(table, None, None)[ids].astype(dtype), None, "batch", None, None)


def _look_up_fwd(table, ids, shape, dtype):
    return _look_up(table, ids, shape, dtype), ids


def _look_up_bwd(shape, dtype, ids, gradient):
    def local(ids, gradient):
        return summed(jnp.zeros(shape, jnp.float32).at[ids].add(gradient.astype(jnp.float32)))

    batch, layout = spec(None, "batch"), gradient_layout(shape)[0]
    mapped = jax.shard_map(local, mesh=current_mesh(), in_specs=batch, out_specs=layout, check_vma=False)
    return mapped(ids, gradient), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)

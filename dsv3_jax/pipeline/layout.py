"""How the parameters that a run keeps become those of a stage, and gradients of stages those of parameters.

A state is laid out over the mesh without regard to stages: layers stacked in order, each array split along
one of its other dimensions over `pipe`, so that no rank keeps more than its share whatever the schedule, and
a checkpoint does not know of it. For a step every rank receives the layers of its stages in whole: one
`all_to_all` over `pipe` there, and one back for the gradients, which sums what two ranks hold (DualPipe).
The functions here run inside `shard_map`; "local" is what one device holds.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.pipeline.transformer import STACKS

Tree = Any
Axes = tuple[tuple[str, ...], ...]  # [dimension]: the mesh's axes over which it is split.


def over_pipe(shardings: Tree, shapes: Tree, mesh: Mesh) -> Tree:
    """Shardings that also split over `pipe` the outermost dimension that is whole and that `pipe` divides.

    Outermost: what travels then lies in long pieces of memory. Never `layers`: a stage needs some of them
    whole. An array with no such dimension stays as it is.
    """
    size = mesh.shape["pipe"]

    def one(path: Any, sharding: NamedSharding, leaf: Any) -> NamedSharding:
        axes = [sharding.spec[i] if i < len(sharding.spec) else None for i in range(len(leaf.shape))]
        first = int(stacked(path))
        free = [i for i in range(first, len(axes)) if not axes[i] and leaf.shape[i] % size == 0]
        if size == 1 or not free:
            return sharding
        axes[free[0]] = "pipe"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(one, shardings, shapes)


def stacked(path: Any) -> bool:
    """Whether the array at this path of a state has a leading axis of layers."""
    return any(getattr(key, "key", None) in STACKS for key in path)


def axes_of(spec: PartitionSpec, n_dims: int) -> Axes:
    """The mesh's axes of every dimension."""
    entries = [spec[i] if i < len(spec) else None for i in range(n_dims)]
    return tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries)


def gather(local: jax.Array, axes: Axes, names: Sequence[str]) -> jax.Array:
    """What is split over the axes `names`, whole."""
    for dim, split in enumerate(axes):
        for name in reversed(split):
            if name in names:
                local = lax.all_gather(local, name, axis=dim, tiled=True)
    return local


def scatter(addend: jax.Array, axes: Axes, names: Sequence[str]) -> jax.Array:
    """The sum over the axes `names`, split again as before `gather`."""
    for dim, split in enumerate(axes):
        for name in split:
            if name in names:
                addend = lax.psum_scatter(addend, name, scatter_dimension=dim, tiled=True)
    rest = tuple(name for name in names if not any(name in split for split in axes))
    return lax.psum(addend, rest) if rest else addend


def to_chunks(local: jax.Array, axes: Axes, layers: np.ndarray, names: Sequence[str]) -> jax.Array:
    """The layers of this rank's chunks, [chunk, place, ...], gathered over `pipe` and the axes `names`.

    Args:
      local: [layer, ...].
      axes: its layout.
      layers: [rank, chunk, place], the number of the layer; -1 is empty, and filled with any layer's numbers.
      names: axes to gather, besides `pipe`.
    """
    numbers = jnp.asarray(np.maximum(layers, 0))
    dim = _split_over_pipe(axes)
    if dim is None:
        rows = local[numbers[lax.axis_index("pipe")].reshape(-1)]
    else:
        rows = local[numbers.reshape(-1)]
        rows = lax.all_to_all(rows, "pipe", split_axis=0, concat_axis=dim, tiled=True)
    rows = gather(rows, axes, names)
    return rows.reshape(*layers.shape[1:], *rows.shape[1:])


def from_chunks(chunks: jax.Array, axes: Axes, layers: np.ndarray, names: Sequence[str]) -> jax.Array:
    """The sum over ranks and over the axes `names`, [layer, ...] and split as before `to_chunks`."""
    n_layers = int(layers.max()) + 1
    numbers = jnp.asarray(np.where(layers < 0, n_layers, layers))  # Past the end: dropped.
    rows = scatter(chunks.reshape(-1, *chunks.shape[2:]), axes, names)
    dim = _split_over_pipe(axes)
    if dim is not None:
        rows = lax.all_to_all(rows, "pipe", split_axis=dim, concat_axis=0, tiled=True)
        where = numbers.reshape(-1)
    else:
        where = numbers[lax.axis_index("pipe")].reshape(-1)
    total = jnp.zeros((n_layers, *rows.shape[1:]), rows.dtype).at[where].add(rows, mode="drop")
    return total if dim is not None else lax.psum(total, "pipe")


def _split_over_pipe(axes: Axes) -> int | None:
    return next((dim for dim, split in enumerate(axes) if "pipe" in split), None)

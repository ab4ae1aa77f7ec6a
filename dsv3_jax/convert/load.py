"""Arrays on their devices, from any source, a piece at a time."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, SingleDeviceSharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.convert import mapping
from dsv3_jax.convert.mapping import Leaf
from dsv3_jax.convert.sources import Source, rows_of
from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.parallel.mesh import state_shardings

# Shards up to this size are put together on the host; larger ones grow on the device, a piece at a time.
ON_HOST = 256 << 20


def variables(source: Source, dtype: Any = None, mesh: Mesh | None = None) -> dict[str, Any]:
    """`{"params": ..., "router": ...}` as the model takes them.

    Args:
      source: without kept E4M3 (see `sources.Dequantised`).
      dtype: of the parameters; None keeps each as it is stored. The router state is always float32.
      mesh: every array is split as the axes of the mesh say, over `data` too; None puts all on the first
        device.
    """
    return {"params": {}, "router": {}} | mapping.nested(
        arrays(source, _shardings(source.config, mesh), dtype).items()
    )


def arrays(
    source: Source, layout: dict[mapping.Path, jax.sharding.Sharding], dtype: Any = None
) -> dict[mapping.Path, jax.Array]:
    """The arrays of a source that a layout names, each read to where the layout puts it.

    Args:
      source: without kept E4M3.
      layout: sharding by path; a process reads what its own devices hold.
      dtype: see `variables`.
    """
    found = {}
    for path, sharding in layout.items():
        kind = source.dtypes[path] if dtype is None else np.dtype(dtype)
        if path[0] == "router":
            kind = np.dtype(np.float32)
        found[path] = _array(source, source.leaves[path], kind, sharding)
    return found


@functools.lru_cache(maxsize=8)
def _shardings(config: ModelConfig, mesh: Mesh | None) -> dict[mapping.Path, jax.sharding.Sharding]:
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        return dict.fromkeys(mapping.leaves(config), device)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    boxed = jax.eval_shape(lambda rng: init_variables(Transformer(config), rng), key)
    tree = state_shardings(boxed, mesh, lambda _: True)
    flat, _ = jax.tree_util.tree_flatten_with_path(meta.unbox(tree))
    return {tuple(part.key for part in path): sharding for path, sharding in flat}


def _array(source: Source, leaf: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    by_index: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None  # None is for devices of other processes.
        ranges = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        by_index.setdefault(ranges, []).append(device)
    shards = []
    for ranges, devices in by_index.items():
        size = math.prod(stop - start for start, stop in ranges) * dtype.itemsize
        build = _on_host if size <= ON_HOST else _on_device
        shards += build(source, leaf, dtype, ranges, devices)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _pieces(source: Source, leaf: Leaf, dtype: np.dtype, ranges: tuple):
    """(position in the shard, values) of everything within `ranges`, in the model's order of axes."""
    own = ranges[leaf.lead :]
    first, last = own[leaf.order[0]]
    others = tuple(slice(*own[axis]) for axis in leaf.order[1:])
    back = tuple(np.argsort(leaf.order))
    rows = rows_of(leaf, source.dtypes[leaf.path].itemsize)
    for lead in itertools.product(*(range(*bounds) for bounds in ranges[: leaf.lead])):
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            values = source.read(leaf.path, lead, start, stop)[(slice(None), *others)]
            position = [0] * len(own)
            position[leaf.order[0]] = start - first
            where = tuple(at - bounds[0] for at, bounds in zip(lead, ranges, strict=False))
            yield (*where, *position), values.transpose(back).astype(dtype, copy=False)


def _on_host(source: Source, leaf: Leaf, dtype: np.dtype, ranges: tuple, devices: list) -> list[jax.Array]:
    shard = np.empty(tuple(stop - start for start, stop in ranges), dtype)
    for position, values in _pieces(source, leaf, dtype, ranges):
        inner = position[leaf.lead :]
        where = tuple(slice(at, at + size) for at, size in zip(inner, values.shape, strict=True))
        shard[(*position[: leaf.lead], *where)] = values
    return [jax.device_put(shard, device) for device in devices]


@functools.partial(jax.jit, donate_argnums=0)
def _update(shard: jax.Array, values: jax.Array, position: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, values, tuple(position))


def _on_device(source: Source, leaf: Leaf, dtype: np.dtype, ranges: tuple, devices: list) -> list[jax.Array]:
    shape = tuple(stop - start for start, stop in ranges)
    shards = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for position, values in _pieces(source, leaf, dtype, ranges):
        values = values.reshape((1,) * leaf.lead + values.shape)
        at = np.asarray(position, np.int32)
        # Waiting bounds what is in flight: the host holds one piece at a time.
        shards = [jax.block_until_ready(_update(shard, values, at)) for shard in shards]
    return shards

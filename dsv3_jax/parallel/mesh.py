"""The device mesh and the one table that maps logical axes of arrays to its axes.

The batch is split over `data` x `expert`, the experts' weights over `expert`, the stages of a pipeline over
`pipe`. ZeRO-1 splits the optimizer state over `data` too, and the experts' master weights, FSDP all
parameters (DeepSeek-V3 §3.1; arXiv 1910.02054). Any axis may be 1, and one device runs the same code.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh_checks import mesh_shape
from dsv3_jax.parallel.transport import Wire, choose
from pallas_kernels import implementations

AXES = ("pipe", "data", "expert")

# Logical axis -> mesh axes. Axes that are not listed are never split by name; `data` may still take
# the outermost of them when a state is sharded over the replicas (`state_spec`).
Table = Mapping[str, tuple[str, ...]]
LOGICAL_AXES: Table = {"batch": ("data", "expert"), "experts": ("expert",)}


class _Current(NamedTuple):
    mesh: Mesh | None
    options: MeshConfig
    manual: bool


_NOWHERE = _Current(None, MeshConfig(), False)
_current: ContextVar[_Current | None] = ContextVar("mesh", default=None)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (pipe, data, expert) over the first devices that it needs; `expert` has neighbours."""
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    return Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), AXES)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None, options: MeshConfig | None = None, *, manual: bool = False) -> Iterator[None]:
    """Makes `mesh` the one that `constrain`, `current_mesh` and `expert_wire` see while a function is traced.

    Args:
      mesh: from `make_mesh`.
      options: how experts exchange tokens; the defaults if None.
      manual: the function runs inside a `shard_map` over all axes of the mesh: its arrays are those of one
        device, nothing is left to lay out, and the routed experts use the axis `expert` as it is.
    """
    token = _current.set(_Current(mesh, options or MeshConfig(), manual))
    try:
        with implementations.one_device(mesh is not None and mesh.size == 1):
            yield
    finally:
        _current.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh that arrays are to be laid out over; None where there is none, or one device, or `manual`."""
    mesh, _, manual = _current.get() or _NOWHERE
    return None if mesh is None or mesh.size == 1 or manual else mesh


def expert_wire() -> Wire | None:
    """How tokens reach experts of other devices, under the surrounding `use_mesh`; None if all are here."""
    mesh, options, _ = _current.get() or _NOWHERE
    return None if mesh is None or mesh.shape["expert"] == 1 else _wire(mesh, options)


@functools.cache
def _wire(mesh: Mesh, options: MeshConfig) -> Wire:
    transport = choose(options.transport, mesh.devices.flat[0].platform)
    node = options.expert_node or _node(mesh.devices)
    return Wire("expert", mesh.shape["expert"], transport, options.dispatch_slack, node)


def _node(devices: np.ndarray) -> int:
    """Consecutive ranks of `expert` that share a fast network: an NVLink domain, a TPU slice, else a process.

    1, tokens go straight to each rank, if the nodes of different ranks differ in size.
    """

    def node(device: Any) -> int:
        number = getattr(device, "slice_index", None)
        return device.process_index if number is None else number

    sizes = set()
    for ranks in devices.reshape(-1, devices.shape[-1]):  # `expert` is the last axis.
        sizes |= {len(list(same)) for _, same in itertools.groupby(ranks, node)}
    return sizes.pop() if len(sizes) == 1 else 1


def size_here(size: int, logical: str) -> int:
    """How long an axis of a parameter is: under a `manual` mesh it is one device's part."""
    mesh, _, manual = _current.get() or _NOWHERE
    if mesh is None or not manual:
        return size
    return size // math.prod(mesh.shape[axis] for axis in LOGICAL_AXES[logical])


def spec(*logical: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(LOGICAL_AXES.get(axis) if axis else None for axis in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins the layout of an activation by its logical axes; does nothing without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(*logical)))


def state_spec(
    logical: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    over_data: bool,
    table: Table = LOGICAL_AXES,
) -> PartitionSpec:
    """The layout of a parameter or of its optimizer state.

    Args:
      logical: the array's axes.
      shape: its shape.
      mesh: the mesh.
      over_data: split, too, the outermost dimension that the replicas divide: those of `data` for experts,
        whose own axis they may split further; of `data` and `expert` for all else, or of `data` alone if only
        that divides. Outermost, because then the parts of a reduce-scatter or an all-gather lie one after the
        other in memory: no transpose before or after it. Never `layers`: the scan takes slices of it.
      table: logical axis -> mesh axes. A pipeline may put `layers` over `pipe`; a stack that `pipe` does not
        divide stays whole.
    """
    axes = [table.get(axis) if axis else None for axis in logical]
    for i, over in enumerate(axes):
        if logical[i] == "layers" and over and shape[i] % math.prod(mesh.shape[axis] for axis in over):
            axes[i] = None
    used = {name for axis in axes if axis for name in axis}
    for replicas in (("data", "expert"), ("data",)) if over_data else ():
        if math.prod(mesh.shape[name] for name in replicas) == 1 or used.intersection(replicas):
            continue
        split = [(axis or ()) + replicas for axis in axes]
        parts = [math.prod(mesh.shape[name] for name in names) for names in split]
        free = [i for i, name in enumerate(logical) if name != "layers" and shape[i] % parts[i] == 0]
        if free:
            axes[free[0]] = split[free[0]]
            break
    return PartitionSpec(*axes)


def splits(sharding: str, logical: Sequence[str | None]) -> bool:
    """Whether the replicas split a parameter with these axes: any under FSDP, experts' under ZeRO-1."""
    return sharding == "fsdp" or (sharding == "zero1" and "experts" in logical)


class ExpertLayout(NamedTuple):
    """How a layer's expert weights [experts, ...] lie on the devices."""

    spec: PartitionSpec
    kept: bool  # What is gathered in the forward pass stays for the backward pass (ZeRO-1).


def expert_layout(shape: Sequence[int]) -> ExpertLayout:
    """How the state lays out a layer's expert weights of this shape, under the surrounding `use_mesh`."""
    mesh, options, _ = _current.get() or _NOWHERE
    assert mesh is not None
    names = ("experts", *[None for _ in shape[1:]])
    found = state_spec(names, shape, mesh, splits(options.sharding, names))
    return ExpertLayout(found, options.sharding == "zero1")


def state_shardings(
    boxed: Any, mesh: Mesh, over_data: Callable[[Sequence[str | None]], bool], table: Table = LOGICAL_AXES
) -> Any:
    """NamedShardings for a tree of Flax-partitioned ShapeDtypeStructs, as `state_spec` lays them out.

    `over_data` says by a parameter's logical axes whether the replicas split it.
    """

    def one(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.Partitioned):
            names, shape = leaf.names, leaf.value.shape
            return NamedSharding(mesh, state_spec(names, shape, mesh, over_data(names), table))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())

"""The real program's state on a machine that is not here, laid out as training does. Nothing is allocated."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.mesh_checks import mesh_shape
from dsv3_jax.model import init_variables
from dsv3_jax.parallel.mesh import AXES, splits, state_shardings
from dsv3_jax.planning.hardware import PlanError, Topology
from dsv3_jax.training.state import make_model


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device that is only named: enough of one to build a mesh and to trace for it."""

    id: int
    platform: str
    device_kind: str
    process_index: int = 0


class Split(NamedTuple):
    """How a run is spread over its devices."""

    data: int
    expert: int
    sharding: str  # "replicated", "zero1" or "fsdp".

    @property
    def n_devices(self) -> int:
        """All of them."""
        return self.data * self.expert

    def __str__(self) -> str:
        return f"data={self.data} expert={self.expert} {self.sharding}"


def split_of(config: Config, topology: Topology) -> Split:
    """The mesh of a run on a topology, -1 resolved; `mesh_checks.problems` must have found none.

    Raises:
      PlanError: the mesh leaves devices idle, or has pipeline stages.
    """
    shape = mesh_shape(config.mesh, topology.n_devices)
    if shape.pipe > 1:
        raise PlanError(
            f"mesh.pipe = {shape.pipe}: plans are of data x expert: mesh.pipe=1; --pipeline plans schedules"
        )
    if shape.data * shape.expert != topology.n_devices:
        raise PlanError(
            f"topology = {topology.text!r}: {topology.n_devices} devices, and the mesh takes "
            f"{shape.data * shape.expert}: set mesh.data=-1 for all of them"
        )
    return Split(shape.data, shape.expert, config.mesh.sharding)


def stand_in_mesh(data: int, expert: int, platform: str, pipe: int = 1) -> Mesh:
    """A mesh of devices that are not here."""
    sizes = {"pipe": pipe, "data": data, "expert": expert}
    devices: Any = np.empty(math.prod(sizes.values()), dtype=object)
    for i in range(devices.size):
        devices[i] = StandIn(i, platform, platform)
    return Mesh(devices.reshape([sizes[axis] for axis in AXES]), AXES)


@functools.lru_cache(maxsize=8)
def boxed_parameters(config: Config) -> Any:
    """The parameters' shapes with their logical axes."""
    rng = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    return jax.eval_shape(lambda key: init_variables(make_model(config), key)["params"], rng)


def parameter_shapes(config: Config) -> Any:
    """The parameters' shapes."""
    return meta.unbox(boxed_parameters(_model_only(config)))


class Part(NamedTuple):
    """A group of parameters on one device."""

    whole: int  # Elements that the device multiplies by: all but other ranks' experts.
    held: int  # Elements of its share of them, where `sharding` splits parameters.
    moments: int  # Elements of each of its two moments.


@functools.lru_cache(maxsize=512)
def parts(config: Config, split: Split) -> dict[str, Part]:
    """Parameters on a device: of "experts" (routed), "embedding", "head" and all "other" ones."""
    boxed = boxed_parameters(_model_only(config))
    mesh = stand_in_mesh(split.data, split.expert, "cpu")
    alone = {over: state_shardings(boxed, mesh, lambda _, over=over: over) for over in (False, True)}
    found: dict[str, Part] = dict.fromkeys(("experts", "embedding", "head", "other"), Part(0, 0, 0))
    leaves = jax.tree_util.tree_leaves_with_path(meta.unbox(boxed))
    layouts = zip(jax.tree.leaves(alone[False]), jax.tree.leaves(alone[True]), strict=True)
    for (path, shape), (plain, over_data) in zip(leaves, layouts, strict=True):
        names = [key.key for key in path]
        kind = names[0] if names[0] in found else "other"
        if names[-1] in ("gate_up", "down") and names[-2] == "moe":
            kind = "experts"
        whole, shard = (math.prod(x.shard_shape(shape.shape)) for x in (plain, over_data))
        held = shard if splits(split.sharding, [kind]) else whole
        moments = shard if split.sharding in ("fsdp", "zero1") else whole
        found[kind] = Part(*map(sum, zip(found[kind], (whole, held, moments), strict=True)))
    return found


def _model_only(config: Config) -> Config:
    """A config that names the same parameters: for caches."""
    return Config(model=config.model)

"""The real program's shapes on a machine that is not here: its state, and what its backward pass keeps.

Both come from tracing the code that trains, on devices that are names only. Nothing is allocated.
"""

import dataclasses
import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from dsv3_jax.config import Config, MeshConfig
from dsv3_jax.mesh_checks import mesh_shape
from dsv3_jax.model import forward, init_variables
from dsv3_jax.parallel.mesh import AXES, state_shardings, use_mesh
from dsv3_jax.planning.hardware import PlanError, Topology
from dsv3_jax.training.losses import losses
from dsv3_jax.training.state import make_model
from pallas_kernels import target_platform


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
    alone = {over: state_shardings(boxed, mesh, over_data=over) for over in (False, True)}
    found: dict[str, Part] = dict.fromkeys(("experts", "embedding", "head", "other"), Part(0, 0, 0))
    leaves = jax.tree_util.tree_leaves_with_path(meta.unbox(boxed))
    layouts = zip(jax.tree.leaves(alone[False]), jax.tree.leaves(alone[True]), strict=True)
    for (path, shape), (plain, over_data) in zip(leaves, layouts, strict=True):
        names = [key.key for key in path]
        kind = names[0] if names[0] in found else "other"
        if names[-1] in ("gate_up", "down") and names[-2] == "moe":
            kind = "experts"
        whole, shard = (math.prod(x.shard_shape(shape.shape)) for x in (plain, over_data))
        held = shard if split.sharding == "fsdp" else whole
        moments = shard if split.sharding in ("fsdp", "zero1") else whole
        found[kind] = Part(*map(sum, zip(found[kind], (whole, held, moments), strict=True)))
    return found


def _model_only(config: Config) -> Config:
    """A config that names the same parameters: for caches."""
    return Config(model=config.model)


@functools.lru_cache(maxsize=64)
def _kept(config: Config, expert: int, platform: str) -> float:
    model = make_model(config)
    seq, depth = config.train.seq_len, config.model.mtp.depth
    rng = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    variables = meta.unbox(jax.eval_shape(lambda key: init_variables(model, key), rng))
    # Two replicas at least: on several devices kernels run under `shard_map`, however many this machine has.
    data = 2 if expert == 1 else 1
    shape = (data * expert, seq)  # A sequence a device.
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids) | {"loss_mask": mask}

    def kept(params, router, batch):
        def loss(params):
            segments = batch["segment_ids"] if config.data.mask_documents else None
            inputs = batch["tokens"], batch["positions"], segments, batch["targets"]
            outputs = forward(model, {"params": params, "router": router}, *inputs)
            ones = jnp.ones(depth + 1)
            return losses(outputs, batch, ones, 1.0, jnp.float32(0.3), config.train.loss_chunk).loss

        return jax.vjp(loss, params)[1]

    mesh = stand_in_mesh(data, expert, platform)
    with target_platform(platform), use_mesh(mesh, config.mesh):
        residuals = jax.eval_shape(kept, variables["params"], variables.get("router", {}), batch)
    # Parameters are kept too, and counted elsewhere; so is the head's gradient, which has its shape.
    parameters = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(variables["params"])}
    arrays = [leaf for leaf in jax.tree.leaves(residuals) if jnp.issubdtype(leaf.dtype, jnp.number)]
    arrays = [leaf for leaf in arrays if (leaf.shape, leaf.dtype) not in parameters]
    if expert > 1:
        # Of rows that travelled, the trace keeps SwiGLU's input twice; the compiler merges equal arrays.
        wide = 2 * config.model.moe.d_ff_expert
        rows = {(x.shape, x.dtype): x for x in arrays if x.shape[-1:] == (wide,) and expert not in x.shape}
        arrays = [x for x in arrays if (x.shape, x.dtype) not in rows] + list(rows.values())
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize / (data * expert) for leaf in arrays)


def kept_for_backward(config: Config, expert: int, platform: str) -> float:
    """Bytes a sequence that the forward pass leaves for the backward pass on a device.

    They are the residuals of `jax.vjp` of the real loss, traced with a sequence a device: what the remat
    policy, the kernels of `platform` and the exchange between experts keep.
    """
    node = config.mesh.expert_node
    mesh = dataclasses.replace(
        MeshConfig(data=1, expert=expert, expert_node=node if node and expert % node == 0 else 1),
        transport=config.mesh.transport,
        dispatch_slack=config.mesh.dispatch_slack,
    )
    train = dataclasses.replace(type(config.train)(), seq_len=config.train.seq_len)
    for name in ("precision", "remat", "loss_chunk"):
        train = dataclasses.replace(train, **{name: getattr(config.train, name)})
    data = dataclasses.replace(type(config.data)(), mask_documents=config.data.mask_documents)
    key = Config(model=config.model, data=data, train=train, fp8=config.fp8, mesh=mesh)
    logger = logging.getLogger("pallas_kernels")
    level, _ = logger.level, logger.setLevel(logging.WARNING)
    try:
        return _kept(key, expert, platform)
    finally:
        logger.setLevel(level)

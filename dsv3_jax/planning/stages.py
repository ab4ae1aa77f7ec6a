"""What a rank of a pipeline holds while it works off its table: bytes, before anything is compiled.

The peak of a step lies inside the loop over ticks: before it there are no gradients, and behind it the
gradients of stages give way to those of parameters. There a rank holds its share of the state, the parameters
of its stages and the sums of their gradients, the slots, and what a backward works with: the residuals of the
real `jax.vjp` of a stage, traced on devices that are names only, and the gradients that it adds to the sums.
The forward half of F&B and the temporaries of single operations are not counted.
"""

import dataclasses
import logging
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import use_mesh
from dsv3_jax.pipeline import runner, step
from dsv3_jax.pipeline.schedules import Schedule, ScheduleError, build, n_stages, stage_sizes
from dsv3_jax.pipeline.table import place
from dsv3_jax.planning.shapes import stand_in_mesh
from dsv3_jax.training.losses import losses
from dsv3_jax.training.state import TrainState, abstract_state, make_model, shardings
from pallas_kernels import target_platform

Tree = Any


class Memory(NamedTuple):
    """Bytes of the fullest rank inside the loop over ticks."""

    state: float  # Its share of the parameters in float32 and of both moments.
    stages: float  # Parameters of its stages, of embedding, head and prediction blocks, in float32.
    gradients: float  # Their sums, float32.
    slots: float  # Inputs of stages and gradients of their outputs.
    residuals: float  # What the forward pass inside a backward leaves for its other half.
    added: float  # Gradients of one stage, before they are added to the sums.

    @property
    def total(self) -> float:
        """At the peak."""
        return sum(self)


def of_rank(config: Config, mesh: Mesh, platform: str) -> Memory:
    """The memory of a training step through the pipeline that the configuration names.

    Args:
      config: names the schedule, the batch and the remat policy.
      mesh: with the axes pipe, data and expert; its devices need not be here.
      platform: "cpu", "gpu" or "tpu", whose kernels decide what is kept.

    Raises:
      ScheduleError: there is no such schedule.
    """
    train = config.train
    micro = train.micro_batch_size or train.batch_size
    n_micro = train.batch_size // micro
    schedule = build(train.pipeline, mesh.shape["pipe"], n_micro, chunks=train.pipeline_chunks)
    abstract = abstract_state(config, mesh)
    traced = _trace(config, mesh, platform, schedule, abstract)
    held = _bytes(traced.chunks) + _bytes(traced.shared)
    chunk = _bytes(traced.chunks) / len(schedule.stages_of(0))
    slots = sum(max(sizes) + 1 for sizes in place(schedule).n_slots.values())
    residuals = traced.residuals
    if train.remat != "none":  # One layer's are there again while its backward runs.
        whole = dataclasses.replace(config, train=dataclasses.replace(train, remat="none"))
        again = _trace(whole, mesh, platform, schedule, abstract).residuals
        residuals += again / math.ceil(config.model.n_layers / schedule.n_stages)
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
        if leaf.sharding.memory_kind != "pinned_host"
    )
    added = chunk + _bytes(traced.shared)
    return Memory(state, held, held, slots * _bytes(traced.x), residuals, added)


def planned(
    config: Config, pipeline: str, ranks: int, n_microbatches: int, chunks: int, platform: str = "gpu"
) -> Memory:
    """`of_rank` for a schedule; all else, as model, remat, micro-batch, `mesh.data`, is the configuration's.

    Where it names no `train.micro_batch_size`, its batch is cut into the micro-batches.

    Raises:
      ScheduleError: no such schedule, fewer layers than stages, or the batch cannot be cut so.
    """
    train, mesh = config.train, dataclasses.replace(config.mesh, pipe=ranks, data=max(config.mesh.data, 1))
    micro = train.micro_batch_size or train.batch_size // n_microbatches
    devices = mesh.data * mesh.expert
    if not micro or micro % devices:
        raise ScheduleError(
            f"train.micro_batch_size = {micro}: {devices} devices, mesh.data x mesh.expert, share a "
            f"micro-batch: set it to a multiple of {devices}"
        )
    stage_sizes(config.model.n_layers, n_stages(pipeline, ranks, chunks))
    train = dataclasses.replace(
        train,
        pipeline=pipeline,
        pipeline_chunks=chunks,
        micro_batch_size=micro,
        batch_size=micro * n_microbatches,
    )
    config = dataclasses.replace(config, train=train, mesh=mesh)
    return of_rank(config, stand_in_mesh(mesh.data, mesh.expert, platform, ranks), platform)


def lines(memory: Memory) -> list[str]:
    """As text."""
    rows = [("memory of a rank at the peak of a step, GPU", memory.total)]
    rows += [(f"  {WORDS[name]}", size) for name, size in memory._asdict().items()]
    return [f"{name:<46}{size / 2**30:>9.3f} GiB" for name, size in rows]


WORDS = {
    "state": "its share of parameters and moments",
    "stages": "parameters of its stages",
    "gradients": "sums of their gradients",
    "slots": "what waits in slots",
    "residuals": "residuals of a backward",
    "added": "gradients of one stage, not yet added",
}


class _Traced(NamedTuple):
    chunks: Tree  # Shapes of the parameters of a rank's stages, [chunk, ...].
    shared: Tree
    x: Any  # Shape of an activation.
    residuals: float  # Bytes.


def _trace(config: Config, mesh: Mesh, platform: str, schedule: Schedule, state: TrainState) -> _Traced:
    train, model = config.train, make_model(config)
    micro = train.micro_batch_size or train.batch_size
    shape = schedule.n_microbatches, micro, train.seq_len
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids) | {"loss_mask": mask}
    layouts = shardings(state).params
    layers = step.layers_by_rank(config.model, schedule)
    whole = any(op.kind == "B" for cells in schedule.cells for cell in cells for op in cell)
    found: dict[str, Any] = {}

    def loss(outputs, micro):
        ones = jnp.ones(config.model.mtp.depth + 1)
        return losses(outputs, micro, ones, 1.0, jnp.float32(0.3), train.loss_chunk)

    def on_device(params: Tree, router: Tree, batch: Tree, stage: jax.Array):
        with use_mesh(mesh, config.mesh, manual=True):
            parts = step.functions(config, model, schedule, loss, 1.0)
            chunks, shared = step.gathered(params, router, layouts, layers)
            rank = runner.Rank(parts, schedule.n_stages, chunks, shared, batch)
            x, residuals = rank.residuals("B" if whole else "W", stage)
        given = {id(leaf) for leaf in jax.tree.leaves((chunks, shared))}
        kept = [leaf for leaf in residuals if id(leaf) not in given]
        shapes = jax.eval_shape(lambda: (chunks, shared, x))
        found["traced"] = _Traced(shapes[0], shapes[1], shapes[2], _bytes(kept))
        return ()

    specs = jax.tree.map(lambda layout: layout.spec, layouts)
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, P(), P(None, step.BATCH), P()), out_specs=(), check_vma=False
    )
    logger = logging.getLogger("pallas_kernels")  # Which kernels run where is not news here.
    level, _ = logger.level, logger.setLevel(logging.WARNING)
    try:
        with target_platform(platform):
            jax.eval_shape(mapped, state.params, state.router, batch, jax.ShapeDtypeStruct((), jnp.int32))
    finally:
        logger.setLevel(level)
    return found["traced"]


def _bytes(tree: Tree) -> float:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.number)]
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))

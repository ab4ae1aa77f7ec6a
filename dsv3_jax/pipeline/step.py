"""Loss and gradients of a training step through a pipeline, on a mesh of `pipe` x `data` x `expert`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import Config
from dsv3_jax.model.transformer import Outputs, Transformer
from dsv3_jax.parallel.mesh import LOGICAL_AXES, use_mesh
from dsv3_jax.pipeline import layout, runner
from dsv3_jax.pipeline.cells import Schedule
from dsv3_jax.pipeline.schedules import build
from dsv3_jax.pipeline.table import place
from dsv3_jax.pipeline.transformer import STACKS, HasLoss, layers_by_stage, parts

Tree = Any
BATCH = LOGICAL_AXES["batch"]


class Found(NamedTuple):
    """Of one step, summed over micro-batches and devices."""

    grads: Tree  # As the parameters, float32, in their layout.
    losses: Any  # What `loss` gave: of the head and of multi-token prediction.
    balance_loss: jax.Array  # Of the layers.
    counts: jax.Array  # [rows, experts], as `Outputs.counts`.


def gradients(
    config: Config,
    model: Transformer,
    mesh: Mesh,
    shardings: Tree,
    variables: Tree,
    batch: Tree,
    constants: Tree,
    loss: Callable[[Outputs, Tree, Tree], HasLoss],
) -> Found:
    """The gradients of a step.

    Args:
      config: names the schedule.
      model: with its precision and remat policy.
      mesh: with the axes pipe, data and expert.
      shardings: of the parameters.
      variables: {"params": ..., "router": ...} of the whole model.
      batch: arrays [micro-batch, sequences, seq].
      constants: what `loss` needs besides, the same on every device.
      loss: (outputs, micro, constants) -> the losses of a device's part of a micro-batch; see `parts`.

    Raises:
      ScheduleError: there is no such schedule.
    """
    n_micro, sequences, _ = batch["tokens"].shape
    train = config.train
    schedule = build(train.pipeline, mesh.shape["pipe"], n_micro, chunks=train.pipeline_chunks)
    table = place(schedule)
    layers = layers_by_rank(model.config, schedule)
    n_devices = mesh.shape["data"] * mesh.shape["expert"]

    def on_device(params: Tree, router: Tree, batch: Tree, constants: Tree):
        with use_mesh(mesh, config.mesh, manual=True):
            share = 1 / (n_micro * n_devices)
            own = functions(
                config, model, schedule, lambda outputs, micro: loss(outputs, micro, constants), share
            )
            chunks, shared = gathered(params, router, shardings, layers)
            sums = runner.run(table, own, chunks, shared, batch)
        grads = _scattered(sums, shardings, layers)
        everywhere = sums.head, sums.body["balance"].sum()
        (losses, late), balance = lax.psum(everywhere, ("pipe", *BATCH))
        counts = late
        if "moe_layers" in layers:
            early = layout.from_chunks(sums.body["counts"], ((),), layers["moe_layers"], BATCH)
            counts = jnp.concatenate([early, late])
        return grads, losses, balance, counts

    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs, P(), P(None, BATCH), P()),
        out_specs=(specs, P(), P(), P()),
        check_vma=False,
    )
    return Found(*mapped(variables["params"], variables.get("router", {}), batch, constants))


def functions(
    config: Config,
    model: Transformer,
    schedule: Schedule,
    loss: Callable[[Outputs, Tree], HasLoss],
    balance_share: float,
) -> runner.Parts:
    """The model's functions for the runner; layers are unrolled where cells overlap. See `parts`."""
    overlaps = any(len(cell) > 1 for cells in schedule.cells for cell in cells)
    mask_documents = config.data.mask_documents
    return parts(
        model, schedule.n_stages, loss, balance_share, mask_documents=mask_documents, unroll=overlaps
    )


def layers_by_rank(config: Any, schedule: Schedule) -> dict[str, np.ndarray]:
    """By stack, [rank, chunk, place]: the layer's number, or -1."""
    held = np.array([schedule.stages_of(rank) for rank in range(schedule.n_ranks)])
    return {stack: where[held] for stack, where in layers_by_stage(config, schedule.n_stages).items()}


def gathered(params: Tree, router: Tree, shardings: Tree, layers: dict[str, np.ndarray]):
    """(chunks, shared) of the runner, from what a device holds."""

    def chunk(leaf: jax.Array, where: np.ndarray, at: NamedSharding | None = None) -> jax.Array:
        axes = layout.axes_of(at.spec if at else P(), leaf.ndim)
        return layout.to_chunks(leaf, axes, where, _copies(axes))

    def whole(leaf: jax.Array, at: NamedSharding) -> jax.Array:
        axes = layout.axes_of(at.spec, leaf.ndim)
        return layout.gather(leaf, axes, ("pipe", *_copies(axes)))

    chunks = {}
    for stack, where in layers.items():
        chunks[stack] = {
            "params": jax.tree.map(
                lambda leaf, at, where=where: chunk(leaf, where, at), params[stack], shardings[stack]
            ),
            "router": jax.tree.map(lambda leaf, where=where: chunk(leaf, where), router.get(stack, {})),
        }
    rest = {name: jax.tree.map(whole, params[name], shardings[name]) for name in params if name not in STACKS}
    biases = {name: router[name] for name in router if name not in STACKS}
    return chunks, {"params": rest, "router": biases}


def _scattered(sums: runner.Sums, shardings: Tree, layers: dict[str, np.ndarray]) -> Tree:
    """Gradients of what a device holds."""

    def stacked(leaf: jax.Array, where: np.ndarray, at: NamedSharding) -> jax.Array:
        axes = layout.axes_of(at.spec, leaf.ndim - 1)
        return layout.from_chunks(leaf, axes, where, _copies(axes))

    def part(leaf: jax.Array, at: NamedSharding) -> jax.Array:
        axes = layout.axes_of(at.spec, leaf.ndim)
        return layout.scatter(leaf, axes, ("pipe", *_copies(axes)))

    shared = sums.shared["params"]
    grads = {name: jax.tree.map(part, shared[name], shardings[name]) for name in shared}
    for stack, where in layers.items():
        grads[stack] = jax.tree.map(
            lambda leaf, at, where=where: stacked(leaf, where, at),
            sums.chunks[stack]["params"],
            shardings[stack],
        )
    return grads


def _copies(axes: layout.Axes) -> tuple[str, ...]:
    """The axes over which devices work on different sequences with the same values of an array."""
    experts = LOGICAL_AXES["experts"]
    # Where experts are, a dimension is split over these first; else by ZeRO, over `data` first.
    held = any(split[: len(experts)] == experts for split in axes)
    return tuple(name for name in BATCH if not held or name not in experts)

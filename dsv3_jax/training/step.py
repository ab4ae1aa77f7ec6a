"""The training step: a pure function `(state, batch) -> (state, metrics)`.

    micro-batches -> gradients and expert counts, summed -> AdamW -> router bias, once, from the counts

A step whose loss or gradients are not finite returns the state it was given. On request the step brings the
moving average of the parameters up to date meanwhile, with the parameters that it starts from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model import Outputs, forward
from dsv3_jax.model.router import max_violation, updated_bias
from dsv3_jax.model.transformer import merge_router_counts
from dsv3_jax.parallel.mesh import LOGICAL_AXES, current_mesh, make_mesh, replicated, use_mesh
from dsv3_jax.pipeline import step as pipeline
from dsv3_jax.training import ema, ema_beside, optimizer
from dsv3_jax.training.losses import Batch, Losses, cross_entropy, denominators, losses
from dsv3_jax.training.state import TrainState, abstract_state, make_model, shardings


class Schedules(NamedTuple):
    """What changes from step to step, float32 scalars that the host computes exactly."""

    learning_rate: Float[Array, ""] | float
    bias_speed: Float[Array, ""] | float
    mtp_weight: Float[Array, ""] | float


class Metrics(NamedTuple):
    """What a step reports, on device."""

    losses: Losses
    grad_norm: Float[Array, ""]  # Before clipping.
    finite: Bool[Array, ""]  # False: the step changed nothing.
    counts: Int[Array, "rows experts"]  # Tokens an expert over the whole step, a row a MoE layer.
    max_vio: Float[Array, " rows"]


def gradients(
    config: Config, state: TrainState, batch: Batch, n_micro: Int[Array, ""] | int, mtp_weight: Array
) -> tuple[Any, Losses, Int[Array, "rows experts"]]:
    """Gradients, losses and expert counts of the first `n_micro` micro-batches of the batch.

    Args:
      config: the run.
      state: parameters and router state.
      batch: arrays [micro-batches, micro-batch, seq]. Micro-batches past `n_micro` are not touched.
      n_micro: how many count; a traced scalar during a batch-size ramp.
      mtp_weight: lambda.
    """
    if config.train.pipeline:
        return _pipelined(config, state, batch, mtp_weight)
    model = make_model(config)
    slots = batch["tokens"].shape[0]
    used = jnp.arange(slots)[:, None, None] < n_micro
    totals = denominators(batch | {"loss_mask": batch["loss_mask"] & used}, config.model.mtp.depth)
    share = 1.0 / n_micro

    def loss_of(params: Any, micro: Batch):
        variables = {"params": params, "router": state.router}
        segments = micro["segment_ids"] if config.data.mask_documents else None
        outputs = forward(model, variables, micro["tokens"], micro["positions"], segments, micro["targets"])
        parts = losses(outputs, micro, totals, share, mtp_weight, config.train.loss_chunk)
        return parts.loss, (parts, outputs.counts)

    grad = jax.grad(loss_of, has_aux=True)

    def one(index: Int[Array, ""] | int):
        micro = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), batch)
        grads, (parts, counts) = grad(state.params, micro)
        return grads, parts, counts

    if slots == 1:  # No accumulator: it would be one more copy of the parameters.
        return one(0)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    return lax.fori_loop(0, n_micro, lambda i, total: jax.tree.map(jnp.add, total, one(i)), start)


def _pipelined(
    config: Config, state: TrainState, batch: Batch, mtp_weight: Array
) -> tuple[Any, Losses, Int[Array, "rows experts"]]:
    """`gradients` through the pipeline that the configuration names."""
    mesh = current_mesh() or make_mesh(config.mesh)
    totals = denominators(batch, config.model.mtp.depth)
    devices = mesh.shape["data"] * mesh.shape["expert"]
    share = 1.0 / (batch["tokens"].shape[0] * devices)  # Of a micro-batch on one device.

    def loss(outputs: Outputs, micro: Batch, constants: tuple[Array, Array]) -> Losses:
        return losses(outputs, micro, constants[0], share, constants[1], config.train.loss_chunk)

    found = pipeline.gradients(
        config,
        make_model(config),
        mesh,
        shardings(abstract_state(config, mesh)).params,
        {"params": state.params, "router": state.router},
        batch,
        (totals, mtp_weight),
        loss,
    )
    late, layers = found.losses, found.balance_loss
    parts = late._replace(loss=late.loss + layers, balance_loss=late.balance_loss + layers)
    return found.grads, parts, found.counts


def train_step(
    config: Config, state: TrainState, batch: Batch, n_micro: Int[Array, ""] | int, schedules: Schedules
) -> tuple[TrainState, Metrics]:
    """One optimizer step over a batch [micro-batches, micro-batch, seq]; see `gradients`."""
    found = gradients(config, state, batch, n_micro, jnp.asarray(schedules.mtp_weight))
    scale = optimizer.norm_and_clip_scale(found[0], config.optimizer.clip_norm)
    return _updated(config, state, found, scale, schedules)


def train_step_beside_average(
    config: Config,
    state: TrainState,
    batch: Batch,
    n_micro: Int[Array, ""] | int,
    schedules: Schedules,
    update: ema_beside.Update,
    average: ema_beside.Average,
    changed: Bool[Array, ""],
) -> tuple[TrainState, Metrics, ema_beside.Average]:
    """`train_step`, and the moving average with the parameters that the step was given.

    Args:
      update: of `ema_beside.make_update`.
      average: the average without them, in host memory.
      changed: whether the last step changed the parameters; if not, the average stays as it is.
    """
    average, batch = update(average, state.params, changed, batch)
    found = gradients(config, state, batch, n_micro, jnp.asarray(schedules.mtp_weight))
    norm, clip = optimizer.norm_and_clip_scale(found[0], config.optimizer.clip_norm)
    # What overwrites the parameters waits for the average; without this XLA would copy all of them.
    params, average, norm = lax.optimization_barrier((state.params, average, norm))
    return *_updated(config, state._replace(params=params), found, (norm, clip), schedules), average


def _updated(
    config: Config,
    state: TrainState,
    found: tuple[Any, Losses, Int[Array, "rows experts"]],
    scale: tuple[Float[Array, ""], Float[Array, ""]],
    schedules: Schedules,
) -> tuple[TrainState, Metrics]:
    """The state after a step, from the gradients, their norm and the factor that clips them."""
    (grads, parts, counts), (norm, clip) = found, scale
    finite = jnp.isfinite(parts.loss) & jnp.isfinite(norm)
    params, moments = optimizer.adamw_update(
        state.params,
        grads,
        state.optimizer,
        schedules.learning_rate,
        clip,
        config.optimizer,
        finite,
    )
    with jax.named_scope("router_bias"):
        speed = jnp.where(finite, schedules.bias_speed, 0.0)
        router = jax.tree.map(
            lambda bias, count: updated_bias(bias, count, speed),
            state.router,
            merge_router_counts(state.router, counts),
        )
    metrics = Metrics(parts, norm, finite, counts, max_violation(counts))
    return TrainState(params, router, moments), metrics


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of batch arrays [micro-batches, micro-batch, seq]."""
    return NamedSharding(mesh, PartitionSpec(None, LOGICAL_AXES["batch"], None))


def make_train_step(config: Config, mesh: Mesh, average: bool = False) -> Callable[..., Any]:
    """`train_step` jitted for a mesh: `(state, batch, n_micro, schedules)`. The state is donated.

    With `average`, `train_step_beside_average`: `(..., average, changed)`. The average is donated too.
    """
    abstract = abstract_state(config, mesh)
    layout = shardings(abstract)
    lanes, update = ema_beside.lane_count(mesh), None
    if average:
        update = ema_beside.make_update(config.train.ema_decay, abstract.params, batch_sharding(mesh), lanes)
    ramp = config.train.ramp_start_batch > 0

    def step(state: TrainState, batch: Batch, n_micro: Any, schedules: Schedules, *rest: Any):
        with use_mesh(mesh, config.mesh):
            # A known trip count lets XLA see the loop's length; only a ramp needs it at run time.
            n = n_micro if ramp else batch["tokens"].shape[0]
            if update:
                return train_step_beside_average(config, state, batch, n, schedules, update, *rest)
            return train_step(config, state, batch, n, schedules)

    alone = replicated(mesh)
    ins, outs = (layout, batch_sharding(mesh), alone, alone), (layout, alone)
    if not average:
        return jax.jit(step, in_shardings=ins, out_shardings=outs, donate_argnums=0)
    hosts = ema.shardings(layout.params, config.train.ema_memory)
    places = jax.tree.map(lambda x: x.sharding, ema_beside.abstract_average(abstract.params, hosts))
    return jax.jit(
        step,
        in_shardings=(*ins, places, alone),
        out_shardings=(*outs, places),
        donate_argnums=(0, 4),
        compiler_options=ema_beside.COMPILER_OPTIONS if lanes else None,
    )


def make_eval_step(config: Config, mesh: Mesh) -> Callable[..., tuple[Array, Array]]:
    """Jitted `(params, router, batch) -> (sum of cross-entropy and number of targets, expert counts)`.

    The batch is [1, sequences, seq]; only the main model's loss is measured.
    """
    model = make_model(config)

    def evaluate(params: Any, router: Any, batch: Batch):
        with use_mesh(mesh, config.mesh):
            micro = jax.tree.map(lambda x: x[0], batch)
            segments = micro["segment_ids"] if config.data.mask_documents else None
            variables = {"params": params, "router": router}
            outputs = forward(model, variables, micro["tokens"], micro["positions"], segments)
            weights = micro["loss_mask"].astype(jnp.float32)
            chunk = config.train.loss_chunk
            total: Any = cross_entropy(outputs.hidden, outputs.head, micro["targets"], weights, chunk)
            return jnp.stack([total, weights.sum()]), outputs.counts

    layout = shardings(abstract_state(config, mesh))
    return jax.jit(
        evaluate,
        in_shardings=(layout.params, layout.router, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), replicated(mesh)),
    )

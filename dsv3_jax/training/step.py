"""The training step: a pure function `(state, batch) -> (state, metrics)`.

    micro-batches -> gradients and expert counts, summed -> AdamW -> router bias, once, from the counts

A step whose loss or gradients are not finite returns the state it was given.
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
from dsv3_jax.training import optimizer
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
    grads, parts, counts = gradients(config, state, batch, n_micro, jnp.asarray(schedules.mtp_weight))
    norm, clip = optimizer.norm_and_clip_scale(grads, config.optimizer.clip_norm)
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


def make_train_step(config: Config, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
    """`train_step` jitted for a mesh: `(state, batch, n_micro, schedules)`. The state is donated."""
    layout = shardings(abstract_state(config, mesh))
    ramp = config.train.ramp_start_batch > 0

    def step(state: TrainState, batch: Batch, n_micro: Any, schedules: Schedules):
        with use_mesh(mesh, config.mesh):
            # A known trip count lets XLA see the loop's length; only a ramp needs it at run time.
            n = n_micro if ramp else batch["tokens"].shape[0]
            return train_step(config, state, batch, n, schedules)

    return jax.jit(
        step,
        in_shardings=(layout, batch_sharding(mesh), replicated(mesh), replicated(mesh)),
        out_shardings=(layout, replicated(mesh)),
        donate_argnums=0,
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

"""Auxiliary losses that balance the experts' load: DeepSeek-V3's, and DeepSeek-V2's as baselines.

All of them are sums of f * P: f is the measured load, without gradient, P the mean affinity. Each is 1
(times its weight) when the load is even. The weights are in `MoEConfig`; a weight of 0 costs nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import MoEConfig
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.mesh import LOGICAL_AXES


def _selected(indices: Int[Array, "batch seq k"], n_experts: int) -> Float[Array, "batch seq experts"]:
    """1 where a token selects the expert."""
    return jax.nn.one_hot(indices, n_experts, dtype=jnp.float32).sum(-2)


def _over_shards(mean: Float[Array, " experts"]) -> Float[Array, " experts"]:
    """The mean over the devices of a batch that `shard_map` has split by hand.

    Of the loads alone: the loss is linear in the affinities, so its mean over devices is that of the batch.
    """
    split = tuple(
        axis for axis in LOGICAL_AXES["batch"] if axis in jax.sharding.get_abstract_mesh().manual_axes
    )
    return jax.lax.pmean(mean, split) if split else mean


def sequence_and_batch_losses(
    routing: Routing, config: MoEConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """V3's sequence-wise loss (eqs 17-20) and its batch-wise form (§4.5.3).

    f_i counts the top-K of the affinities themselves, as eq 18 writes it, not of the biased scores.
    """
    _, top = jax.lax.top_k(jax.lax.stop_gradient(routing.scores), config.top_k)
    fraction = _selected(top, config.n_experts) * (config.n_experts / config.top_k)
    share = routing.scores / (routing.scores.sum(-1, keepdims=True) + 1e-20)  # eq 19
    by_sequence = (fraction.mean(1) * share.mean(1)).sum(-1).mean()  # eqs 17, 18 and 20
    by_batch = (_over_shards(fraction.mean((0, 1))) * share.mean((0, 1))).sum()
    return by_sequence, by_batch


def v2_losses(
    routing: Routing, config: MoEConfig
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """V2's expert-, device- and communication-level losses (DeepSeek-V2 eqs 23-31), by sequence.

    A device is a group of experts: D = n_groups, and a token may reach M = topk_groups of them.
    """
    groups = config.n_groups
    chosen = _selected(routing.indices, config.n_experts)
    f = chosen.mean(1) * (config.n_experts / config.top_k)  # eq 24
    p = routing.scores.mean(1)  # eq 25
    by_expert = (f * p).sum(-1).mean()  # eq 23
    grouped_f, grouped_p = (x.reshape(x.shape[0], groups, -1) for x in (f, p))
    p_device = grouped_p.sum(-1)  # eq 28
    by_device = (grouped_f.mean(-1) * p_device).sum(-1).mean()  # eqs 26 and 27
    reached = chosen.reshape(*chosen.shape[:2], groups, -1).max(-1)
    f_sent = reached.mean(1) * (groups / config.topk_groups)  # eq 30
    by_communication = (f_sent * p_device).sum(-1).mean()  # eqs 29 and 31
    return by_expert, by_device, by_communication


def balance_loss(routing: Routing, config: MoEConfig) -> Float[Array, ""]:
    """The weighted sum of all balance losses of one layer, float32."""
    total = jnp.zeros((), jnp.float32)
    if config.sequence_loss or config.batch_loss:
        by_sequence, by_batch = sequence_and_batch_losses(routing, config)
        total += config.sequence_loss * by_sequence + config.batch_loss * by_batch
    if config.expert_loss or config.device_loss or config.communication_loss:
        by_expert, by_device, by_communication = v2_losses(routing, config)
        total += config.expert_loss * by_expert
        total += config.device_loss * by_device + config.communication_loss * by_communication
    return total

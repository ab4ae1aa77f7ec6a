"""Which experts a token goes to, and with what weight (DeepSeek-V3 §2.1.2, eqs 12-16; V2 §2.2).

The bias steers the selection only: gates use the scores without it, so no gradient reaches it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import MoEConfig


class Routing(NamedTuple):
    """The router's decision for each token."""

    indices: Int[Array, "batch seq top_k"]  # The experts selected.
    gates: Float[Array, "batch seq top_k"]  # Their weights g_i, float32.
    scores: Float[Array, "batch seq experts"]  # All affinities s_i, float32, before the bias.


def affinities(
    u: Float[Array, "batch seq d"], centroids: Float[Array, "d experts"], gate: str
) -> Float[Array, "batch seq experts"]:
    """s_i = sigmoid(u . e_i) (V3 eq 15) or softmax over the experts (V2 eq 21), in float32."""
    logits = jnp.einsum("bsd,de->bse", u.astype(jnp.float32), centroids, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.sigmoid(logits) if gate == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def _top2_sum(x: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """The sum of the two largest along the last axis, by maxima: sorting takes a CPU three times as long."""
    first = x.max(-1, keepdims=True)
    is_first = x == first
    second = jnp.where(is_first, -jnp.inf, x).max(-1)
    tied = is_first.sum(-1) > 1
    return first[..., 0] + jnp.where(tied, first[..., 0], second)


def mask_groups(biased: Float[Array, "*batch experts"], config: MoEConfig) -> Float[Array, "*batch experts"]:
    """Node-limited routing (V3 §2.1.2): -inf outside the best `topk_groups` groups.

    -inf and not 0: biased scores can be negative, and a masked expert must never win.
    """
    if config.n_groups == config.topk_groups:
        return biased
    groups = biased.reshape(*biased.shape[:-1], config.n_groups, -1)
    if config.group_score == "top2_sum":
        group_scores = _top2_sum(groups)
    else:
        group_scores = groups.max(-1)
    _, best = jax.lax.top_k(group_scores, config.topk_groups)
    allowed = jax.nn.one_hot(best, config.n_groups, dtype=bool).any(-2)
    return jnp.where(allowed[..., None], groups, -jnp.inf).reshape(biased.shape)


def route(
    u: Float[Array, "batch seq d"],
    centroids: Float[Array, "d experts"],
    bias: Float[Array, " experts"],
    config: MoEConfig,
) -> Routing:
    """Selects the top-K of s + b and weighs them by s (V3 eqs 13, 14 and 16); ties go to the lower index."""
    scores = affinities(u, centroids, config.gate)
    biased = jax.lax.stop_gradient(scores) + jax.lax.stop_gradient(bias)
    _, indices = jax.lax.top_k(mask_groups(biased, config), config.top_k)
    gates = jnp.take_along_axis(scores, indices, axis=-1)
    if config.normalize_gates:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(indices, gates * config.routed_scale, scores)


def load(indices: Int[Array, "batch seq top_k"], n_experts: int) -> Int[Array, " experts"]:
    """Tokens sent to each expert, int32. Under a sharded batch this is the sum over all shards."""
    return jnp.zeros(n_experts, jnp.int32).at[indices.reshape(-1)].add(1)


def updated_bias(
    bias: Float[Array, "*layers experts"],
    counts: Int[Array, "*layers experts"],
    speed: Float[Array, ""] | float,
) -> Float[Array, "*layers experts"]:
    """b_i += speed * sign(mean load - load_i) (arXiv 2408.15664, algorithm 1).

    `counts` must cover the whole step: every shard and every micro-batch.
    """
    counts = counts.astype(jnp.float32)
    return bias + speed * jnp.sign(counts.mean(-1, keepdims=True) - counts)


def max_violation(counts: Int[Array, "*layers experts"]) -> Float[Array, "*layers"]:
    """MaxVio = max_i(load_i) / mean(load) - 1 (arXiv 2408.15664, eq 4)."""
    counts = counts.astype(jnp.float32)
    return counts.max(-1) / jnp.maximum(counts.mean(-1), 1e-9) - 1

"""Multi-token prediction as draft model: draft, verify in one pass, keep what the model itself would say.

DeepSeek-V3 §5.4.3 with the rejection rule of speculative sampling (arXiv 2211.17192, §2.3): the tokens kept
have the distribution of plain decoding, and at temperature 0 they are its tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation import forward
from dsv3_jax.generation.cache import LatentCache
from dsv3_jax.generation.sampling import Sampler, distribution, draw, keys, penalise
from dsv3_jax.generation.weights import Weights

# What a random key is for (`sampling.keys`).
TOKEN, DRAFT, ACCEPT = 0, 1, 2


def window(drafts: int) -> int:
    """Positions that the depths read again at every step.

    With D drafts at most D + 1 are new. Depth k had read up to k - 1 before them with drafts, which may have
    been rejected.
    """
    return 2 * drafts


class Drafts(NamedTuple):
    """Tokens proposed for the positions that follow, and the distributions that they were drawn from."""

    tokens: Int[Array, "batch drafts"]
    probs: Float[Array, "batch drafts vocab"] | None  # None when all is greedy.


def with_seen(seen: Bool[Array, "batch seen"], tokens: Int[Array, " batch"]) -> Bool[Array, "batch seen"]:
    """`seen` with one more token of each sequence; empty where no request has a penalty."""
    return seen | jax.nn.one_hot(tokens, seen.shape[1], dtype=bool)


def penalised(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch seen"], sampler: Sampler
) -> Float[Array, "batch vocab"]:
    """Logits after the repetition penalty. Without `seen` there are neither penalties nor filters."""
    return penalise(logits, seen, sampler.repetition_penalty) if seen.shape[1] else logits


def propose(
    weights: Weights,
    cache: LatentCache,
    hidden: Float[Array, "batch window d"],
    recent: Int[Array, "batch window"],
    seen: Bool[Array, "batch seen"],
    sampler: Sampler,
    active: Bool[Array, " batch"],
    config: ModelConfig,
    *,
    greedy: bool = False,
) -> tuple[Drafts, LatentCache]:
    """One token from each depth, in a chain (DeepSeek-V3 eqs 21-23).

    Args:
      weights: of the model.
      cache: holds `lengths` tokens of each sequence.
      hidden: the model's hidden states of the last of these, after the final norm.
      recent: the tokens one position later; the last is not in the cache yet.
      seen: tokens seen by each sequence.
      sampler: how drafts are drawn: like all tokens.
      active: sequences that go on.
      config: the model.
      greedy: every draft is the most probable token.
    """
    drafts, size = hidden.shape[1] // 2, hidden.shape[1]
    tokens, probs, state = recent, [], hidden
    for depth in range(1, drafts + 1):
        with jax.named_scope(f"draft_{depth}"):
            later = tokens[:, depth - 1 : depth - 1 + size]
            out, cache = forward.draft(weights, cache, depth, state, later, active, config)
            logits = penalised(forward.head(weights, out[:, -1]), seen, sampler)
            if greedy:
                token = logits.argmax(-1).astype(jnp.int32)
            else:
                probs.append(distribution(logits, sampler, filters=seen.shape[1] > 0))
                token = draw(probs[-1], keys(sampler, cache.lengths + depth, DRAFT))
        seen = with_seen(seen, token)
        tokens = jnp.concatenate([tokens, token[:, None]], 1)
        state = out if config.mtp.kind == "sequential" else hidden
    return Drafts(tokens[:, size:], None if greedy else jnp.stack(probs, 1)), cache


def verify(
    drafts: Drafts,
    probs: Float[Array, "batch drafts_and_one vocab"],
    sampler: Sampler,
    positions: Int[Array, " batch"],
) -> tuple[Int[Array, "batch drafts_and_one"], Int[Array, " batch"]]:
    """The tokens to emit, and how many of them are accepted drafts; one more is drawn anew.

    Draft x of distribution q is kept with probability min(1, p(x) / q(x)). The first that is not is replaced
    by a draw from max(p - q, 0), normalised; when all are kept the model's next token comes after them.

    Args:
      drafts: the proposals.
      probs: the model's own distributions p at their positions, and at the one after.
      sampler: seeds.
      positions: of the first draft in each text.
    """
    assert drafts.probs is not None
    count = drafts.tokens.shape[1]
    kept = jnp.ones(positions.shape, bool)
    accepted = jnp.zeros(positions.shape, jnp.int32)
    for j in range(count):
        token = drafts.tokens[:, j, None]
        p = jnp.take_along_axis(probs[:, j], token, axis=-1)[:, 0]
        q = jnp.take_along_axis(drafts.probs[:, j], token, axis=-1)[:, 0]
        u = jax.vmap(jax.random.uniform)(keys(sampler, positions + j, ACCEPT))
        kept &= u * q < p
        accepted += kept
    at = accepted[:, None, None]
    p = jnp.take_along_axis(probs, at, axis=1)[:, 0]
    # No draft where all were kept: q = 0 leaves p as it is.
    q = jnp.take_along_axis(jnp.pad(drafts.probs, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
    rest = jnp.maximum(p - q, 0)
    total = rest.sum(-1, keepdims=True)
    # p = q up to rounding is never rejected but by rounding; then p itself is right.
    rest = jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), p)
    last = draw(rest, keys(sampler, positions + accepted, TOKEN))
    tokens = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(count + 1) == accepted[:, None], last[:, None], tokens), accepted

"""One frozen state and one pure step, which the while loop, streaming and continuous batching share."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation import forward
from dsv3_jax.generation.cache import LatentCache
from dsv3_jax.generation.sampling import Sampler, distribution, draw, keys, log_probability
from dsv3_jax.generation.speculation import TOKEN, Drafts, penalised, propose, verify, window, with_seen
from dsv3_jax.generation.weights import Weights
from pallas_kernels import implementations

BURSTS = {"gpu": 8}


@no_type_check  # Of JAX's trees, whose leaves may be shapes.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All that a step reads and changes.

    Attributes:
      cache: holds all tokens of a sequence but the last.
      recent: its last tokens: one, or with drafts `speculation.window`.
      hidden: the model's hidden states of the positions before those; width 0 without drafts.
      seen: tokens that the text contains; width 0 when no request has a penalty or filters.
      sampler: how tokens are chosen.
      left: tokens that may still come.
      active: sequences that go on.
      greedy: no request has a temperature: there are no probabilities to compute, and nothing to draw.
    """

    cache: LatentCache
    recent: Int[Array, "batch recent"]
    hidden: Float[Array, "batch window d"]
    seen: Bool[Array, "batch seen"]
    sampler: Sampler
    left: Int[Array, " batch"]
    active: Bool[Array, " batch"]
    greedy: bool = field(default=False, metadata={"static": True})


class Emitted(NamedTuple):
    """What a step has added to each text."""

    tokens: Int[Array, "batch most"]
    log_probs: Float[Array, "batch most"]  # Of the model itself (`sampling.log_probability`).
    n_tokens: Int[Array, " batch"]  # How many of `tokens` count; 0 for a sequence at rest.
    accepted: Int[Array, " batch"]  # Drafts accepted; -1 for a sequence at rest.
    finite: Bool[Array, " batch"]  # False: the logits were not finite.
    active: Bool[Array, " batch"]  # Sequences that go on.


def _finish(state: DecodeState, tokens: Array, wanted: Array, finite: Array) -> tuple[Array, Array]:
    """(how many of `tokens` count, whether the sequence goes on): a stop token or the limit cuts them."""
    index = jnp.arange(tokens.shape[1])
    stops = (tokens[..., None] == state.sampler.stop[:, None]).any(-1) & (index < wanted[:, None])
    first = jnp.where(stops.any(-1), stops.argmax(-1), tokens.shape[1])
    count = jnp.minimum(jnp.minimum(wanted, first + 1), state.left)
    active = state.active & finite & (first >= count) & (state.left > count)
    return jnp.where(state.active & finite, count, 0), active


def step(weights: Weights, state: DecodeState, config: ModelConfig) -> tuple[DecodeState, Emitted]:
    """The next token of every sequence, or with drafts up to `drafts + 1` of them."""
    cache, size, drafts = state.cache, state.recent.shape[1], state.hidden.shape[1] // 2
    tokens, proposal = state.recent[:, -1:], None
    if drafts:
        arguments = (state.hidden, state.recent, state.seen, state.sampler, state.active)
        proposal, cache = propose(weights, cache, *arguments, config, greedy=state.greedy)
        tokens = jnp.concatenate([tokens, proposal.tokens], 1)
    with jax.named_scope("decode"):
        hidden, logits, cache = forward.decode(weights, cache, tokens, state.active, config)
    with jax.named_scope("sample"):
        seen, choices = state.seen, []
        for j in range(drafts + 1):
            seen = with_seen(seen, tokens[:, j])  # The first has been seen.
            choices.append(penalised(logits[:, j], seen, state.sampler))
        emitted, accepted = _choose(jnp.stack(choices, 1), proposal, state)
        log_probs = jax.vmap(log_probability, (1, 1), 1)(logits, emitted)

    finite = jnp.isfinite(logits).all((1, 2))
    count, active = _finish(state, emitted, accepted + 1, finite)
    seen = state.seen
    for j in range(drafts + 1):
        seen = jnp.where((j < count)[:, None], with_seen(seen, emitted[:, j]), seen)
    read = jnp.where(state.active, accepted + 1, 0)[:, None]

    def last(old: Array, new: Array, length: int) -> Array:
        """The last `length` of old and of the part of new that was read."""
        index = read + jnp.arange(length)
        both = jnp.concatenate([old, new], 1)
        return jnp.take_along_axis(both, index.reshape(*index.shape, *[1] * (both.ndim - 2)), axis=1)

    state = replace(
        state,
        cache=replace(cache, lengths=cache.lengths + read[:, 0]),
        recent=last(state.recent, emitted, size),
        hidden=last(state.hidden, hidden, window(drafts)) if drafts else state.hidden,
        seen=seen,
        left=state.left - count,
        active=active,
    )
    at_rest = read[:, 0] == 0
    return state, Emitted(
        emitted, log_probs, count, jnp.where(at_rest, -1, accepted), finite | at_rest, active
    )


def _choose(logits: Array, proposal: Drafts | None, state: DecodeState) -> tuple[Array, Array]:
    """The tokens to emit [batch, drafts + 1], and how many of them are accepted drafts."""
    if state.greedy:
        best = logits.argmax(-1).astype(jnp.int32)
        if proposal is None:
            return best, jnp.zeros_like(state.left)
        # An accepted draft is the best token; the one after the last of them is its correction.
        kept = jnp.cumprod(proposal.tokens == best[:, :-1], axis=1)
        return best, kept.sum(1).astype(jnp.int32)
    positions = state.cache.lengths + 1
    filters = state.seen.shape[1] > 0
    probs = [distribution(logits[:, j], state.sampler, filters=filters) for j in range(logits.shape[1])]
    if proposal is None:
        return draw(probs[0], keys(state.sampler, positions, TOKEN))[:, None], jnp.zeros_like(state.left)
    return verify(proposal, jnp.stack(probs, 1), state.sampler, positions)


def first_tokens(weights: Weights, state: DecodeState, hidden: Float[Array, "batch d"]):
    """The token after each prompt, from the hidden state of the prompt's last position: (state, Emitted).

    `state.recent` ends with the prompt; its first column leaves as the new token comes.
    """
    logits = forward.head(weights, hidden)
    choices = penalised(logits, state.seen, state.sampler)
    if state.greedy:
        tokens = choices.argmax(-1).astype(jnp.int32)[:, None]
    else:
        probs = distribution(choices, state.sampler, filters=state.seen.shape[1] > 0)
        tokens = draw(probs, keys(state.sampler, state.cache.lengths, TOKEN))[:, None]
    finite = jnp.isfinite(logits).all(-1)
    count, active = _finish(state, tokens, jnp.ones_like(state.left), finite)
    emitted = Emitted(
        tokens,
        log_probability(logits, tokens[:, 0])[:, None],
        count,
        jnp.where(state.active, 0, -1),
        finite | ~state.active,
        active,
    )
    state = replace(
        state,
        recent=jnp.concatenate([state.recent[:, 1:], tokens], 1),
        seen=with_seen(state.seen, tokens[:, 0]),
        left=state.left - count,
        active=active,
    )
    return state, emitted


class Texts(NamedTuple):
    """What `run` has added to each text."""

    tokens: Int[Array, "batch room"]
    log_probs: Float[Array, "batch room"]
    n_tokens: Int[Array, " batch"]
    steps: Int[Array, " batch"]  # Steps that each sequence took part in.
    accepted: Int[Array, "batch drafts"]  # In how many of them draft j was accepted.
    finite: Bool[Array, " batch"]


def run(weights: Weights, state: DecodeState, config: ModelConfig, room: int) -> tuple[DecodeState, Texts]:
    """Steps until no sequence goes on, in one `lax.while_loop`: no return to the host in between.

    On a GPU the host must read the loop's condition, and waits for the device to do so: there several steps
    go between two readings. Steps past the end of all texts change nothing.
    """
    burst = BURSTS.get(implementations.platform(), 1)
    batch, drafts = state.left.shape[0], state.hidden.shape[1] // 2
    zeros = jnp.zeros((batch, room), jnp.int32)
    texts = Texts(
        zeros,
        zeros.astype(jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, drafts), jnp.int32),
        jnp.ones(batch, bool),
    )

    def one(carry: tuple[DecodeState, Texts]) -> tuple[DecodeState, Texts]:
        state, texts = carry
        state, emitted = step(weights, state, config)
        index = jnp.arange(drafts + 1)
        place = jnp.where(index < emitted.n_tokens[:, None], texts.n_tokens[:, None] + index, room)
        rows = jnp.arange(batch)[:, None]
        return state, Texts(
            texts.tokens.at[rows, place].set(emitted.tokens, mode="drop"),
            texts.log_probs.at[rows, place].set(emitted.log_probs, mode="drop"),
            texts.n_tokens + emitted.n_tokens,
            texts.steps + (emitted.accepted >= 0),
            texts.accepted + (emitted.accepted[:, None] > index[:drafts]),
            texts.finite & emitted.finite,
        )

    def several(carry: tuple[DecodeState, Texts]) -> tuple[DecodeState, Texts]:
        return jax.lax.fori_loop(0, burst, lambda _, carry: one(carry), carry)

    return jax.lax.while_loop(lambda carry: carry[0].active.any(), several, (state, texts))

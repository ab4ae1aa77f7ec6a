"""From logits to tokens: temperature, top-k, top-p, min-p, repetition penalty, a seed for each request."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MAX_STOP_TOKENS = 8


class RequestError(ValueError):
    """A request that cannot be served; the message names the field, the value and the limit."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # Divides the logits; 0 takes the most probable token.
    top_k: int = 0  # Only the k most probable tokens; 0: all.
    top_p: float = 1.0  # Only the most probable tokens that together reach this probability.
    min_p: float = 0.0  # Only tokens with this fraction of the most probable one's probability.
    repetition_penalty: float = 1.0  # Over 1: tokens seen before are less probable (arXiv 1909.05858, §4.1).
    seed: int = 0  # Token i of the text depends on the seed, on i and on the logits, on no other request.
    stop_tokens: tuple[
        int, ...
    ] = ()  # Besides the end-of-text token; they end the text and are no part of it.
    stop_strings: tuple[str, ...] = ()  # Likewise, for text.
    ignore_eos: bool = False  # Goes on past the end-of-text token.

    def __post_init__(self):
        def need(ok: bool, field: str, wanted: str) -> None:
            if not ok:
                raise RequestError(f"{field} is {getattr(self, field)!r}, but must be {wanted}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" or field.type is float:
                need(isinstance(value, int | float) and math.isfinite(value), field.name, "a finite number")
        need(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        need(self.temperature >= 0, "temperature", "at least 0")
        need(self.top_k >= 0, "top_k", "at least 0 (0: all tokens)")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        need(self.repetition_penalty > 0, "repetition_penalty", "greater than 0")
        need(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")
        need(len(self.stop_tokens) < MAX_STOP_TOKENS, "stop_tokens", f"fewer than {MAX_STOP_TOKENS} tokens")
        need(all(self.stop_strings), "stop_strings", "strings that are not empty")


class Sampler(NamedTuple):
    """`SamplingParams` of a batch as arrays."""

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    seed: Int[Array, " batch"]  # uint32.
    stop: Int[Array, "batch stops"]  # Padded with -1.


def make_sampler(requests: list[SamplingParams], eos_id: int) -> Sampler:
    """The arrays of a batch of requests."""
    stops = np.full((len(requests), MAX_STOP_TOKENS), -1, np.int32)
    for row, request in zip(stops, requests, strict=True):
        ends = [*request.stop_tokens, *([] if request.ignore_eos else [eos_id])]
        row[: len(ends)] = ends

    def column(name: str) -> Array:
        dtype = {"top_k": np.int32, "seed": np.uint32}.get(name, np.float32)
        return jnp.asarray(np.array([getattr(request, name) for request in requests], dtype))

    return Sampler(*(column(name) for name in Sampler._fields[:-1]), stop=jnp.asarray(stops))


def penalise(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: Float[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    """Logits of tokens seen before divided by the penalty, multiplied if negative (arXiv 1909.05858)."""
    factor = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)


def distribution(
    logits: Float[Array, "batch vocab"], sampler: Sampler, *, filters: bool
) -> Float[Array, "batch vocab"]:
    """The probabilities from which the token is drawn; all on one token where the temperature is 0.

    Filters apply one after the other, each to what the one before has left: top-k, top-p, min-p, after the
    temperature. `filters=False` leaves them out, and with them a sort of the vocabulary.
    """
    greedy = (sampler.temperature == 0)[:, None]
    scaled = logits / jnp.where(greedy, 1.0, sampler.temperature[:, None])
    probs = jax.nn.softmax(scaled, axis=-1)
    if filters:
        probs = _filtered(probs, sampler)
    best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=probs.dtype)
    return jnp.where(greedy, best, probs)


def _filtered(probs: Array, sampler: Sampler) -> Array:
    vocab = probs.shape[-1]
    order = jnp.argsort(-probs, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    k = jnp.where(sampler.top_k == 0, vocab, sampler.top_k)[:, None]
    probs = _renormalised(probs, rank < k)
    descending = jnp.take_along_axis(probs, order, axis=-1)
    before = jnp.cumsum(descending, axis=-1) - descending
    # What is ranked before must not reach top_p by itself; 1 keeps all, whatever the sum's rounding.
    kept = (before < sampler.top_p[:, None]) | (sampler.top_p[:, None] >= 1)
    probs = _renormalised(probs, jnp.take_along_axis(kept, rank, axis=-1))
    return _renormalised(probs, probs >= sampler.min_p[:, None] * probs.max(-1, keepdims=True))


def _renormalised(probs: Array, kept: Array) -> Array:
    left = jnp.where(kept, probs, 0)
    return left / left.sum(-1, keepdims=True)


def keys(sampler: Sampler, positions: Int[Array, " batch"], purpose: int) -> Array:
    """A random key for each sequence: of its seed, the position of the token to decide, and a purpose."""

    def one(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(one)(sampler.seed, positions)


def draw(probs: Float[Array, "batch vocab"], key: Array) -> Int[Array, " batch"]:
    """A token of each distribution, by the Gumbel maximum; the only one where there is one."""
    logits = jnp.where(probs > 0, jnp.log(jnp.where(probs > 0, probs, 1)), -jnp.inf)
    return jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)


def log_probability(
    logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """log P(token) of the model itself, before temperature, penalty and filters."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

"""The device's part of continuous batching: a decode state whose rows requests take and leave."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation import decode
from dsv3_jax.generation.cache import LatentCache, init_cache
from dsv3_jax.generation.decode import DecodeState, Emitted
from dsv3_jax.generation.generator import decode_step
from dsv3_jax.generation.prefill import chunks, prefill_chunk
from dsv3_jax.generation.request_checks import needs_filters
from dsv3_jax.generation.requests import Limits, Request
from dsv3_jax.generation.sampling import SamplingParams, make_sampler
from dsv3_jax.generation.speculation import window
from dsv3_jax.generation.weights import Weights, kernels_for


@dataclass
class Joining:
    """A request whose prompt is being read."""

    request: Request
    pieces: list[tuple[int, int]]  # (start, size) of the chunks to come.
    kept: jax.Array
    table: jax.Array


class Slots:
    """`limits.slots` sequences over one pool of cache pages; no call compiles once each kind has been made.

    Args:
      config: the model.
      weights: of `weights.prepare`.
      limits: what there is room for.
      cache_dtype: a key of `cache.DTYPES`.
      drafts: tokens drafted a step.
      eos_id: the end-of-text token; -1: none.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        limits: Limits,
        cache_dtype: str,
        drafts: int,
        eos_id: int,
    ):
        self.config, self.weights, self.limits = config, weights, limits
        self.drafts, self.eos_id = drafts, eos_id
        cache = init_cache(
            config,
            limits.slots,
            limits.max_tokens + drafts + 1,
            cache_dtype,
            page_size=limits.page_size,
            n_pages=limits.pages,
            drafts=drafts,
        )
        size, dtype = window(drafts), weights.embedding.dtype
        self._state = DecodeState(
            cache,
            jnp.zeros((limits.slots, max(1, size)), jnp.int32),
            jnp.zeros((limits.slots, size, config.d_model), dtype),
            jnp.zeros((limits.slots, 0), bool),
            make_sampler([SamplingParams()] * limits.slots, eos_id),
            jnp.zeros(limits.slots, jnp.int32),
            jnp.zeros(limits.slots, bool),
        )
        self._seen = jnp.zeros((limits.slots, config.vocab_size), bool)
        self._leaving: set[int] = set()  # Slots that the device must still be told about.

    @property
    def page_count(self) -> int:
        """Pages of the pool."""
        return self._state.cache.layers[0].c_kv.shape[0] // self._state.cache.streams

    def begin(self, request: Request) -> Joining:
        """Prepares to read the prompt of a request that has its pages."""
        assert self._state.cache.page_table is not None
        table = np.zeros((1, self._state.cache.page_table.shape[1]), np.int32)
        table[0, : len(request.pages)] = request.pages
        kept = jnp.zeros((1, max(1, window(self.drafts)), self.config.d_model), self.weights.embedding.dtype)
        pieces = list(chunks(len(request.prompt), self.limits.chunk))
        return Joining(request, pieces, kept, jnp.asarray(table))

    def read_chunk(self, joining: Joining) -> None:
        """Reads the next chunk of a prompt."""
        request, cache = joining.request, self._state.cache
        (start, size), *joining.pieces = joining.pieces
        lengths = np.array([len(request.prompt)], np.int32)
        view = LatentCache(cache.layers, jnp.asarray(lengths), joining.table, cache.streams)
        tokens = np.zeros((1, size + self.drafts), np.int32)
        ahead = request.prompt[start : start + size + self.drafts]
        tokens[0, : len(ahead)] = ahead
        operands = self.weights, view, joining.kept, tokens, np.int32(start), lengths
        with kernels_for(self.weights):
            read = prefill_chunk.of(self.config)
            view, joining.kept = read(*operands, self.config, self.limits.chunk, self.drafts)
        assert view.page_table is not None
        joining.table = view.page_table  # The whole view was donated.
        self._state = replace(self._state, cache=replace(cache, layers=view.layers))

    def join(self, joining: Joining) -> Emitted:
        """Puts a request whose prompt is read into its slot; its first token, in row 0."""
        request, params = joining.request, joining.request.params
        recent = np.zeros((1, self._state.recent.shape[1]), np.int32)
        tail = request.prompt[-recent.shape[1] :]
        recent[0, recent.shape[1] - len(tail) :] = tail
        filters = needs_filters(params)
        seen = np.zeros((1, self.config.vocab_size if filters else 0), bool)
        if filters:
            seen[0, request.prompt] = True
        row = DecodeState(
            LatentCache((), jnp.full(1, len(request.prompt), jnp.int32), joining.table, 1),
            jnp.asarray(recent),
            joining.kept if self.drafts else joining.kept[:, :0],
            jnp.asarray(seen),
            make_sampler([params], self.eos_id),
            jnp.full(1, params.max_new_tokens, jnp.int32),
            jnp.ones(1, bool),
            greedy=params.temperature == 0,
        )
        operands = self._state, self._seen, row, joining.kept[:, -1], np.int32(request.slot)
        with kernels_for(self.weights):
            self._state, self._seen, emitted = take_slot(self.weights, *operands)
        self._leaving.discard(request.slot)
        return jax.device_get(emitted)

    def leave(self, slot: int) -> None:
        """The sequence of a slot stops at the next step."""
        self._leaving.add(slot)

    def step(self, wanted: list[SamplingParams]) -> Emitted:
        """Starts a step of all sequences, whose parameters are given; the device works on as this returns."""
        if self._leaving:
            keep = np.ones(self.limits.slots, bool)
            keep[list(self._leaving)] = False
            self._state = replace(self._state, active=_and(self._state.active, keep))
            self._leaving.clear()
        # The vocabulary is sorted only while some request wants it, and random numbers drawn likewise.
        filters = any(map(needs_filters, wanted))
        greedy = not filters and all(params.temperature == 0 for params in wanted)
        seen = self._seen if filters else self._state.seen
        none_seen = self._state.seen
        state = replace(self._state, seen=seen, greedy=greedy)
        with kernels_for(self.weights):
            state, emitted = decode_step.of(self.config)(self.weights, state, self.config)
        if filters:
            self._seen = state.seen
            state = replace(state, seen=none_seen)
        self._state = replace(state, greedy=False)  # Always the same to those that join.
        return emitted


@functools.partial(jax.jit, donate_argnames=("state", "all_seen"))
def take_slot(weights, state: DecodeState, all_seen, row: DecodeState, hidden, slot):
    """Samples the first token of a prompt and puts its row into the state: (state, seen, Emitted)."""
    row, emitted = decode.first_tokens(weights, row, hidden)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slot].set(new[0])

    cache, own = state.cache, row.cache
    assert cache.page_table is not None and own.page_table is not None
    state = DecodeState(
        replace(
            cache, lengths=put(cache.lengths, own.lengths), page_table=put(cache.page_table, own.page_table)
        ),
        put(state.recent, row.recent),
        put(state.hidden, row.hidden),
        state.seen,
        jax.tree.map(put, state.sampler, row.sampler),
        put(state.left, row.left),
        put(state.active, row.active),
    )
    return state, put(all_seen, row.seen) if row.seen.shape[1] else all_seen, emitted


@jax.jit
def _and(left: jax.Array, right: jax.Array) -> jax.Array:
    return left & right

"""`Generator`: prompts in, tokens or text out, at once or as they come."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizers import Tokenizer
from dsv3_jax.generation import decode
from dsv3_jax.generation.cache import DTYPES, LatentCache, init_cache
from dsv3_jax.generation.decode import DecodeState, Emitted
from dsv3_jax.generation.kernel_check import check_kernels
from dsv3_jax.generation.prefill import prefill
from dsv3_jax.generation.programs import FEW_ROWS, Program
from dsv3_jax.generation.request_checks import check_drafts, check_finite, check_prompt, needs_filters
from dsv3_jax.generation.results import Completion, Statistics
from dsv3_jax.generation.sampling import RequestError, SamplingParams, make_sampler
from dsv3_jax.generation.speculation import window
from dsv3_jax.generation.text import Follower, Piece, stops
from dsv3_jax.generation.weights import kernels_for, prepare
from pallas_kernels import implementations

Prompt = str | Sequence[int] | np.ndarray  # Text, or token ids.
CAPACITY_STEP = 256  # Capacities are multiples of it, so that few programs are compiled.
# The products of a small model are too small for XLA to share among the cores of a CPU: there a batch is
# completed in parts of at least so many texts, a core each. All parts read the weights, of so many bytes.
PART, SMALL = 4, 128 << 20  # At 229 MiB parts were no faster, nor slower.


def _first(weights, state, hidden, config):
    del config  # By which the program is chosen.
    return decode.first_tokens(weights, state, hidden)


first_tokens = Program(_first, FEW_ROWS, donate="state")
decode_step = Program(decode.step, FEW_ROWS, donate="state")
decode_run = Program(decode.run, FEW_ROWS, static=("room",), donate="state")


class Generator:
    """Generates from one model.

    Args:
      config: the model.
      variables: its parameters and router state, as training has them.
      tokenizer: for text; None works on tokens, with `eos_id`.
      dtype: of weights and activations.
      cache_dtype: a key of `cache.DTYPES`; None is the cache in `dtype`.
      speculate: drafts a step, at most `config.mtp.depth`; 0 decodes plainly.
      chunk: tokens of a prompt read at once.
      page_size: entries of a cache page; 0 keeps each sequence in one piece.
      eos_id: the end-of-text token when there is no tokenizer; -1: none.
      prefix: tokens before every prompt that is text.

    Raises:
      RequestError: the tokenizer or the drafts do not fit the model.
      SelfCheckError: a kernel is wrong on this machine (`kernel_check`).
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: Any,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        cache_dtype: str | None = None,
        speculate: int = 0,
        chunk: int = 512,
        page_size: int = 0,
        eos_id: int = -1,
        prefix: Sequence[int] = (),
    ):
        check_drafts(config, speculate)
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise RequestError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and model.vocab_size is "
                f"{config.vocab_size}: give the tokenizer that the model was trained with"
            )
        matching = {jnp.dtype(d): name for name, d in DTYPES.items()}[jnp.dtype(dtype)]
        self.config, self.tokenizer = config, tokenizer
        self.cache_dtype, self.drafts, self.chunk = cache_dtype or matching, speculate, chunk
        self.page_size, self.prefix = page_size, tuple(prefix)
        self.eos_id = eos_id if tokenizer is None else tokenizer.eos_id
        check_kernels(config, dtype, self.cache_dtype)
        self.weights = jax.jit(prepare, static_argnums=(1, 2))(variables, config, jnp.dtype(dtype))
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))
        self.statistics = Statistics(accepted=[0] * speculate)

    def encode(self, prompt: Prompt) -> np.ndarray:
        """A prompt's tokens, checked. An empty text continues the end of a document."""
        if not isinstance(prompt, str):
            return check_prompt(prompt, self.config)
        if self.tokenizer is None:
            raise RequestError("the prompt is text, and this generator has no tokenizer: give token ids")
        if not prompt:
            return check_prompt(self.prefix or [self.eos_id], self.config)
        return check_prompt([*self.prefix, *self.tokenizer.encode(prompt).tolist()], self.config)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completes a batch of prompts, of any lengths.

        Raises:
          RequestError: a prompt or a parameter cannot be served, or the model's logits are not finite.
        """
        requests = self._requests(prompts, params)
        if any(request.stop_strings for request in requests):
            return self._by_stream(prompts, requests)
        encoded = [self.encode(prompt) for prompt in prompts]
        size = -(-len(requests) // self._parts(len(requests)))
        starts = range(0, len(requests), size)
        longest = min(max(request.max_new_tokens for request in requests), self.config.max_seq_len)
        room = 1 << (longest - 1).bit_length()
        with ThreadPoolExecutor(len(starts)) as pool:
            jobs = [
                pool.submit(self._run, encoded[i : i + size], requests[i : i + size], room) for i in starts
            ]
        emitted, texts, seconds = (list(each) for each in zip(*(job.result() for job in jobs), strict=True))
        emitted, texts = _joined(emitted), _joined(texts)
        self._count(texts.n_tokens.sum(), texts.steps.sum(), texts.accepted.sum(0), max(seconds))
        check_finite(emitted.finite & texts.finite)
        out = []
        for row, request in enumerate(requests):
            n = texts.n_tokens[row]
            tokens = [*emitted.tokens[row, : emitted.n_tokens[row]].tolist(), *texts.tokens[row, :n].tolist()]
            log_probs = [*emitted.log_probs[row].tolist(), *texts.log_probs[row, :n].tolist()]
            out.append(self._completion(tokens, log_probs, request))
        return out

    def _parts(self, texts: int) -> int:
        """Parts of a batch that run at once."""
        if implementations.platform() != "cpu" or self._bytes > SMALL:
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cores, texts // PART))

    def _run(
        self, encoded: list[np.ndarray], requests: list[SamplingParams], room: int
    ) -> tuple[Any, Any, float]:
        """(Emitted of the first tokens, Texts of the others, seconds of these) of prompts, on the host."""
        state, emitted = self._start(encoded, requests)
        started = time.perf_counter()
        with kernels_for(self.weights):
            _, texts = decode_run.of(self.config)(self.weights, state, self.config, room)
        found = jax.device_get((emitted, texts))
        return *found, time.perf_counter() - started

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Completes one prompt, piece by piece; the last piece has a `finish_reason`."""
        return (pieces[0] for pieces in self.stream_batch([prompt], params))

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[dict[int, Piece]]:
        """For each step, the pieces of the prompts that it continued, by their number."""
        requests = self._requests(prompts, params)
        state, emitted = self._start([self.encode(prompt) for prompt in prompts], requests)
        followers = [Follower(request, self.tokenizer, self.eos_id) for request in requests]
        open_rows = set(range(len(requests)))
        first, started = True, 0.0
        while open_rows:
            # The device is at the next step while the host looks at this one.
            with kernels_for(self.weights):
                state, coming = decode_step.of(self.config)(self.weights, state, self.config)
            if first:  # What has passed is compilation.
                started = time.perf_counter()
            now = jax.device_get(emitted)
            if not first:
                rows = now.accepted >= 0
                by_depth = [(now.accepted > j).sum() for j in range(self.drafts)]
                seconds = time.perf_counter() - started
                self._count(now.n_tokens.sum(), rows.sum(), by_depth, seconds)
                started = time.perf_counter()
            check_finite(now.finite)
            pieces = {row: followers[row].push(now, row) for row in open_rows if now.accepted[row] >= 0}
            open_rows -= {row for row, piece in pieces.items() if piece.finish_reason}
            emitted, first = coming, False
            yield pieces

    def _by_stream(self, prompts, requests) -> list[Completion]:
        pieces: list[list[Piece]] = [[] for _ in requests]
        for step in self.stream_batch(prompts, requests):
            for row, piece in step.items():
                pieces[row].append(piece)
        return [
            Completion(
                [token for piece in row for token in piece.tokens],
                [value for piece in row for value in piece.log_probs],
                "".join(piece.text for piece in row),
                row[-1].finish_reason or "length",
            )
            for row in pieces
        ]

    def _requests(self, prompts, params) -> list[SamplingParams]:
        if not prompts:
            raise RequestError("no prompts: give at least one")
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts and {len(params)} parameters: give one for each")
        return list(params)

    def _start(
        self, encoded: list[np.ndarray], requests: list[SamplingParams]
    ) -> tuple[DecodeState, Emitted]:
        """Prefills and samples the first token of each."""
        lengths = np.array([len(tokens) for tokens in encoded], np.int32)
        padded = np.zeros((len(encoded), lengths.max()), np.int32)
        for row, tokens in zip(padded, encoded, strict=True):
            row[: len(tokens)] = tokens
        limits = np.array([request.max_new_tokens for request in requests])
        left = np.minimum(limits, self.config.max_seq_len - lengths).astype(np.int32)
        # The last step may write drafts past the last token.
        capacity = -(-int((lengths + left).max() + self.drafts) // CAPACITY_STEP) * CAPACITY_STEP
        cache = self._cache(len(encoded), capacity)
        cache, hidden = prefill(
            self.weights, cache, padded, lengths, self.config, chunk=self.chunk, drafts=self.drafts
        )
        recent = np.zeros((len(encoded), max(1, window(self.drafts))), np.int32)
        seen = np.zeros(
            (len(encoded), self.config.vocab_size if any(map(needs_filters, requests)) else 0), bool
        )
        for row, tokens in enumerate(encoded):
            tail = tokens[-recent.shape[1] :]
            recent[row, recent.shape[1] - len(tail) :] = tail
            if seen.shape[1]:
                seen[row, tokens] = True
        state = DecodeState(
            cache,
            jnp.asarray(recent),
            hidden if self.drafts else hidden[:, :0],
            jnp.asarray(seen),
            make_sampler(requests, self.eos_id),
            jnp.asarray(left),
            jnp.ones(len(encoded), bool),
            greedy=all(request.temperature == 0 for request in requests),
        )
        with kernels_for(self.weights):
            return first_tokens.of(self.config)(self.weights, state, hidden[:, -1], self.config)

    def _cache(self, batch: int, capacity: int) -> LatentCache:
        cache = init_cache(
            self.config, batch, capacity, self.cache_dtype, page_size=self.page_size, drafts=self.drafts
        )
        if cache.page_table is None:
            return cache
        table = jnp.arange(cache.page_table.size, dtype=jnp.int32).reshape(cache.page_table.shape)
        return replace(cache, page_table=table)

    def _count(self, tokens, steps, accepted, seconds: float) -> None:
        statistics = self.statistics
        statistics.tokens += int(tokens)
        statistics.steps += int(steps)
        statistics.accepted = [old + int(new) for old, new in zip(statistics.accepted, accepted, strict=True)]
        statistics.seconds += seconds

    def _completion(self, tokens: list[int], log_probs: list[float], request: SamplingParams) -> Completion:
        stopped = tokens[-1] in stops(request, self.eos_id)
        if stopped:
            tokens, log_probs = tokens[:-1], log_probs[:-1]
        text = "" if self.tokenizer is None else self.tokenizer.decode(tokens)
        return Completion(tokens, log_probs, text, "stop" if stopped else "length")


def _joined(parts: list[Any]) -> Any:
    """One batch of several, on the host."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

"""Continuous batching: sequences join and leave between steps, over one pool of cache pages.

Shapes are fixed: `slots` sequences, a page table of one width, prompts read in chunks of a few sizes. So
joining and leaving compile nothing. A request reserves the pages of its longest possible text when it joins,
and never has to wait or be evicted after that.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.tokenizers import Tokenizer
from dsv3_jax.generation.decode import Emitted
from dsv3_jax.generation.kernel_check import check_kernels
from dsv3_jax.generation.prefill import SMALLEST_CHUNK
from dsv3_jax.generation.request_checks import check_drafts, check_prompt
from dsv3_jax.generation.requests import Counters, Limits, Pages, QueueFull, Request
from dsv3_jax.generation.sampling import RequestError, SamplingParams
from dsv3_jax.generation.slots import Joining, Slots
from dsv3_jax.generation.text import Follower, Piece
from dsv3_jax.generation.weights import Weights


class Engine:
    """Serves many requests over one model.

    Call `step` in a loop, or `start` a thread that does. `submit` and `Request.cancel` may be called from any
    thread.

    Args:
      config: the model.
      weights: of `weights.prepare`.
      tokenizer: for text and the end-of-text token; None works on tokens.
      limits: what there is room for.
      cache_dtype: a key of `cache.DTYPES`.
      drafts: tokens drafted a step by the MTP depths.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        tokenizer: Tokenizer | None = None,
        limits: Limits | None = None,
        *,
        cache_dtype: str = "bf16",
        drafts: int = 0,
    ):
        check_drafts(config, drafts)
        check_kernels(config, weights.embedding.dtype, cache_dtype)
        limits = limits or Limits()
        self.limits = replace(limits, max_tokens=min(limits.max_tokens, config.max_seq_len))
        self.config, self.tokenizer, self.drafts = config, tokenizer, drafts
        self.eos_id = -1 if tokenizer is None else tokenizer.eos_id
        self.device = Slots(config, weights, self.limits, cache_dtype, drafts, self.eos_id)
        self.pages = Pages(self.device.page_count)
        self.counters = Counters(accepted=[0] * drafts)
        self._queue: deque[Request] = deque()
        self._slots: list[Request | None] = [None] * limits.slots
        self._joining: Joining | None = None
        self._pending: tuple[list[Request | None], Emitted] | None = None
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.error: BaseException | None = None  # What ended the thread.

    # ------------------------------------------------------------------------------- any thread

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(request is not None for request in self._slots) + (self._joining is not None)

    def submit(self, prompt: Any, params: SamplingParams, deliver: Callable[[Piece], None]) -> Request:
        """Queues a request.

        Raises:
          RequestError: it can never be served; the message names the limit.
          QueueFull: not now.
        """
        tokens = check_prompt(prompt, self.config)
        most = self.limits.max_tokens
        if len(tokens) + params.max_new_tokens > most:
            raise RequestError(
                f"the prompt's {len(tokens)} tokens and max_tokens = {params.max_new_tokens} exceed the "
                f"{most} that this server has room for"
            )
        if self._pages_for(len(tokens), params) > self.pages.count:
            raise RequestError(f"the request needs more than all {self.pages.count} pages of the cache")
        with self._lock:
            if self.error is not None:
                raise RuntimeError("the engine has stopped") from self.error
            if len(self._queue) >= self.limits.queue:
                self.counters.rejected += 1
                raise QueueFull(f"{self.limits.queue} requests are waiting already")
            request = Request(tokens, params, deliver)
            self._queue.append(request)
            self.counters.submitted += 1
            self._lock.notify()
        return request

    def start(self) -> None:
        """Runs `step` in a thread of its own until `stop`."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancels what is under way and ends the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        self._cancel_all()

    def _loop(self) -> None:
        try:
            while True:
                with self._lock:
                    while not (self._stopping or self._queue or self._busy()):
                        self._lock.wait()
                    if self._stopping:
                        return
                self.step()
        except BaseException as error:
            self.error = error
            self._cancel_all("error")
            raise

    def _busy(self) -> bool:
        return bool(self._joining or self._pending or any(self._slots))

    # ------------------------------------------------------------------------- the engine's thread

    def step(self) -> bool:
        """Reads a chunk of a prompt, decodes a step, delivers the step before. False: there is no work."""
        if not (self._queue or self._busy()):
            return False
        self._drop_cancelled()
        if self._joining is None:
            self._admit()
        if self._joining is not None:
            self.device.read_chunk(self._joining)
            if not self._joining.pieces:
                self._join(self._joining.request)
        coming = self._decode() if any(self._slots) else None
        if self._pending is not None:
            self._deliver(*self._pending)
        self._pending = coming
        return True

    def run_until_idle(self) -> None:
        """Steps until every request is answered."""
        while self.step():
            pass

    def _pages_for(self, prompt: int, params: SamplingParams) -> int:
        # Drafts may be written past the last token.
        return -(-(prompt + params.max_new_tokens + self.drafts) // self.limits.page_size)

    def _admit(self) -> None:
        """The next request starts to join, if a slot and its pages are free."""
        free = next((i for i, request in enumerate(self._slots) if request is None), None)
        if free is None or not self._queue:
            return
        pages = self.pages.take(self._pages_for(len(self._queue[0].prompt), self._queue[0].params))
        if pages is None:
            return
        request = self._queue[0]  # It waits until it is seen to run: where neither is seen, no page is held.
        request.pages, request.slot = pages, free
        request.follower = Follower(request.params, self.tokenizer, self.eos_id)
        self._joining = self.device.begin(request)
        with self._lock:
            self._queue.popleft()

    def _join(self, request: Request) -> None:
        """The prompt is read: the request takes its slot, and has its first token."""
        assert self._joining is not None
        emitted = self.device.join(self._joining)
        self._slots[request.slot] = request
        self._joining = None
        self.counters.prompt_tokens += len(request.prompt)
        self.counters.first_token_seconds += time.perf_counter() - request.submitted
        self._push(request, emitted, 0)

    def _decode(self) -> tuple[list[Request | None], Emitted]:
        """Starts a step; the device works on it while the host goes on."""
        emitted = self.device.step([request.params for request in self._slots if request is not None])
        self.counters.steps += 1
        return list(self._slots), emitted

    def _deliver(self, owners: list[Request | None], emitted: Emitted) -> None:
        emitted = jax.device_get(emitted)
        for slot, request in enumerate(owners):
            if request is None or request.done or emitted.accepted[slot] < 0:
                continue
            if self.drafts:
                self.counters.drafts += 1
                for j in range(self.drafts):
                    self.counters.accepted[j] += int(emitted.accepted[slot] > j)
            self._push(request, emitted, slot)

    def _push(self, request: Request, emitted: Emitted, row: int) -> None:
        if not emitted.finite[row]:
            return self._finish(request, Piece([], [], "", "error"))
        piece = request.follower.push(emitted, row)
        self.counters.tokens += len(piece.tokens)
        if piece.finish_reason:
            self._finish(request, piece)
        else:
            request.deliver(piece)

    def _finish(self, request: Request, piece: Piece) -> None:
        """Frees the slot and the pages, and delivers the last piece."""
        request.done = True
        if request.slot >= 0:
            # A step under way may still write there; whoever has the pages next writes after it.
            self.pages.give_back(request.pages)
            request.pages = []
            if self._slots[request.slot] is request:
                self._slots[request.slot] = None
                self.device.leave(request.slot)
        name = {"cancelled": "cancelled", "error": "failed"}.get(piece.finish_reason or "", "completed")
        setattr(self.counters, name, getattr(self.counters, name) + 1)
        request.deliver(piece)

    def _drop_cancelled(self) -> None:
        with self._lock:
            waiting = [request for request in self._queue if request.cancelled]
            for request in waiting:
                self._queue.remove(request)
        joining = self._joining.request if self._joining else None
        if joining is not None and joining.cancelled:
            waiting.append(joining)
        for request in [*waiting, *filter(None, self._slots)]:
            if request.cancelled:
                self._finish(request, Piece([], [], "", "cancelled"))
        if joining is not None and joining.done:
            self._joining = None

    def _cancel_all(self, reason: str = "cancelled") -> None:
        joining = [self._joining.request] if self._joining else []
        self._joining = self._pending = None
        with self._lock:
            everyone = [*self._queue, *joining, *filter(None, self._slots)]
            self._queue.clear()
        for request in everyone:
            self._finish(request, Piece([], [], "", reason))

    def warm_up(self) -> None:
        """Compiles everything that requests can need."""
        plain = SamplingParams(max_new_tokens=2, ignore_eos=True)
        sizes = itertools.takewhile(
            lambda n: n <= min(self.limits.chunk, self.limits.max_tokens - 2),
            (SMALLEST_CHUNK << i for i in itertools.count()),
        )
        greedy = replace(plain, temperature=0.0)
        for params in (plain, greedy, replace(plain, top_k=2), replace(greedy, repetition_penalty=2.0)):
            for size in [1, *sizes]:
                self.submit(np.zeros(size, np.int32), params, lambda piece: None)
                self.run_until_idle()
        self.counters = Counters(accepted=[0] * self.drafts)

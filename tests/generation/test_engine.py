"""Continuous batching gives every request what it would get alone, compiles nothing and loses no page."""

import functools
import time

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.generation import RequestError, SamplingParams
from dsv3_jax.generation.engine import Engine
from dsv3_jax.generation.generator import decode_step
from dsv3_jax.generation.prefill import prefill_chunk
from dsv3_jax.generation.requests import Counters, Limits, QueueFull
from dsv3_jax.generation.slots import take_slot
from tests.generation.models import CONFIGS, generator

LIMITS = Limits(slots=3, max_tokens=48, page_size=4, pages=20, queue=40, chunk=16)


class Answer:
    def __init__(self):
        self.tokens, self.reason = [], None

    def __call__(self, piece):
        assert self.reason is None, "a piece after the last one"
        self.tokens += piece.tokens
        self.reason = piece.finish_reason


@functools.cache
def engine(drafts):
    made = Engine(
        CONFIGS["small"],
        generator("small", speculate=drafts).weights,
        None,
        LIMITS,
        cache_dtype="fp32",
        drafts=drafts,
    )
    if drafts:  # The kinds of requests that its tests make; what `warm_up` compiles for all, the other shows.
        for prompt, params in requests(3, seed=7, sampled=False):
            made.submit(prompt, params, lambda piece: None)
        made.run_until_idle()
        made.counters = Counters(accepted=[0] * drafts)
    else:
        made.warm_up()
    return made


def requests(count, seed, sampled=True):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        greedy = i % 3 or not sampled
        options = {"temperature": 0.0} if greedy else {"top_p": 0.8, "repetition_penalty": 1.2}
        params = SamplingParams(max_new_tokens=int(rng.integers(1, 11)), seed=i, **options)
        found.append((rng.integers(0, 29, rng.integers(1, 33)), params))
    return found


def expected(found):
    """Three at a time by the generator: which `test_generator` compares with the forward."""
    padded = found + found[: -len(found) % 3]
    texts = []
    for i in range(0, len(padded), 3):
        prompts, params = zip(*padded[i : i + 3], strict=True)
        texts += generator("small").generate(prompts, params)
    return [text.tokens for text in texts[: len(found)]]


@pytest.mark.parametrize("drafts", [0, 1])
def test_requests_that_join_and_leave(drafts):
    server = engine(drafts)
    config = CONFIGS["small"]
    programs = prefill_chunk.of(config), decode_step.of(config), take_slot
    compiled = [f._cache_size() for f in programs]
    # With drafts, sampled texts have the same distribution and not the same tokens.
    found = requests(12, seed=1, sampled=not drafts)
    answers, most = [], 0
    for i, (prompt, params) in enumerate(found):
        answers.append(Answer())
        server.submit(prompt, params, answers[-1])
        for _ in range(i % 4):
            server.step()
            most = max(most, server.running)
    server.run_until_idle()
    assert compiled == [f._cache_size() for f in programs]
    assert [answer.tokens for answer in answers] == expected(found)
    assert {answer.reason for answer in answers} == {"length"}
    assert most == 3 and server.running == 0 and server.pages.free == LIMITS.pages
    assert server.counters.completed == 12


def test_cancellation_frees_the_pages():
    server = engine(0)
    before = server.counters.cancelled
    answers, handles = [], []
    for prompt, _ in requests(6, seed=2):
        answers.append(Answer())
        handles.append(server.submit(prompt, SamplingParams(max_new_tokens=15), answers[-1]))
    for _ in range(8):
        server.step()
    running = server._slots[0]
    handles[-1].cancel()  # In the queue.
    assert running is not None and not running.done
    running.cancel()
    server.run_until_idle()
    cancelled = [answer for answer in answers if answer.reason == "cancelled"]
    assert len(cancelled) == server.counters.cancelled - before == 2
    assert all(len(a.tokens) == 15 for a in answers if a not in cancelled)
    assert server.pages.free == LIMITS.pages


def test_what_does_not_fit_is_refused():
    server = engine(0)
    with pytest.raises(RequestError, match="40 tokens and max_tokens = 10 exceed the 48"):
        server.submit(np.ones(40, np.int32), SamplingParams(max_new_tokens=10), Answer())
    with pytest.raises(RequestError, match="empty"):
        server.submit([], SamplingParams(), Answer())
    for _ in range(LIMITS.queue):
        server.submit([1], SamplingParams(max_new_tokens=1), Answer())
    with pytest.raises(QueueFull, match="40 requests"):
        server.submit([1], SamplingParams(max_new_tokens=1), Answer())
    server.run_until_idle()
    assert server.pages.free == LIMITS.pages and server.counters.rejected == 1


def test_broken_logits_fail_their_request_alone():
    server = engine(0)
    healthy = server.device.weights
    answers = [Answer(), Answer()]
    server.device.weights = healthy._replace(head=jnp.full_like(healthy.head, np.nan))
    server.submit([1, 2], SamplingParams(max_new_tokens=3), answers[0])
    server.run_until_idle()
    server.device.weights = healthy
    server.submit([1, 2], SamplingParams(max_new_tokens=3), answers[1])
    server.run_until_idle()
    assert [answer.reason for answer in answers] == ["error", "length"]
    assert server.pages.free == LIMITS.pages


def test_the_thread():
    server = Engine(CONFIGS["small"], generator("small").weights, None, LIMITS, cache_dtype="fp32")
    server.start()
    answers = [Answer() for _ in range(5)]
    found = requests(5, seed=4)
    for (prompt, params), answer in zip(found, answers, strict=True):
        server.submit(prompt, params, answer)
    while any(answer.reason is None for answer in answers):
        time.sleep(0.01)
    server.stop()
    assert [answer.tokens for answer in answers] == expected(found)
    assert server.pages.free == LIMITS.pages

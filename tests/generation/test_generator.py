"""Texts do not depend on how they are batched, cut, paged or streamed; what cannot be served is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.tokenizers import ByteTokenizer
from dsv3_jax.generation import Generator, RequestError, SamplingParams, TextStream, decode, linear
from dsv3_jax.generation.generator import PART
from pallas_kernels import implementations
from tests.generation.models import CONFIGS, generator, teacher_forced, variables
from tests.model.test_transformer import changed, make_variables

GREEDY = SamplingParams(max_new_tokens=10, temperature=0.0)


@functools.cache
def greedy(prompt):
    """By the training forward over the whole text, again for every token."""
    text = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        text.append(int(teacher_forced("v3", text)[-1].argmax()))
    return text[len(prompt) :]


PROMPT = st.lists(st.integers(0, 28), min_size=1, max_size=20)
SETTINGS = [{}, {"page_size": 4, "speculate": 2}, {"page_size": 8, "chunk": 4}]


# Each setting and batch size compiles once; the examples then run in milliseconds.
@settings(max_examples=12)
@given(batch=st.lists(PROMPT, min_size=3, max_size=3), options=st.sampled_from(SETTINGS))
def test_greedy_tokens_whatever_the_batching(batch, options):
    found = generator("v3", **options).generate(batch, GREEDY)
    assert [c.tokens for c in found] == [greedy(tuple(prompt)) for prompt in batch]


@pytest.mark.parametrize("places, alone", [((3,), True), ((3, 5), False)])
def test_kernels_run_where_the_weights_are_on_one_of_several_devices(places, alone, monkeypatch):
    found, linear_of = [], linear._has_kernel

    def has_kernel(*operands):
        found.append(implementations.on_one_device())
        return linear_of(*operands)

    monkeypatch.setattr(linear, "_has_kernel", has_kernel)
    devices = [jax.devices()[i] for i in places]
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "x"), jax.sharding.PartitionSpec())
    # Of another size than every other test's, which may have been traced before.
    config = dataclasses.replace(CONFIGS["small"], max_seq_len=48)
    made = Generator(config, jax.device_put(variables("small"), everywhere))
    (text,) = made.generate([[1, 2, 3]], GREEDY)
    assert set(found) == {alone}
    assert text == generator("small").generate([[1, 2, 3]], GREEDY)[0]


def test_streaming_gives_the_same_tokens():
    prompts = [[1, 2, 3], [4] * 17, [5]]
    sampled = [SamplingParams(max_new_tokens=n, seed=n, top_p=0.9) for n in (5, 10)]
    requests = [GREEDY, *sampled]
    whole = generator("v3").generate(prompts, requests)
    (alone,) = generator("v3").generate(prompts[2:], sampled[1])
    tokens = [[], [], []]
    for pieces in generator("v3").stream_batch(prompts, requests):
        for row, piece in pieces.items():
            tokens[row] += piece.tokens
    assert tokens == [c.tokens for c in whole]
    assert tokens[2] == alone.tokens
    assert [len(row) for row in tokens] == [10, 5, 10]
    assert {c.finish_reason for c in whole} == {"length"}


def test_stop_tokens_end_the_text_and_are_no_part_of_it():
    prompt = (3, 1, 4)
    expected = greedy(prompt)
    stop = expected[4]
    params = dataclasses.replace(GREEDY, stop_tokens=(stop,))
    for options in SETTINGS[:2]:
        found, *_ = generator("v3", **options).generate([prompt] * 3, params)
        assert found.tokens == expected[: expected.index(stop)]
        assert found.finish_reason == "stop" and len(found.log_probs) == len(found.tokens)


def test_steps_between_two_looks_at_the_condition_change_nothing(monkeypatch):
    """As on a GPU, where a loop makes several steps at a time: some go past the end of every text."""
    made = generator("small")
    requests = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (1, 6, 3)]
    prompts = [[1, 2, 3], [4] * 17, [5]]
    expected = [c.tokens for c in made.generate(prompts, requests)]
    monkeypatch.setattr(decode, "BURSTS", {"cpu": 4})
    state, first = made._start([made.encode(prompt) for prompt in prompts], requests)
    state, texts = jax.jit(decode.run, static_argnums=(2, 3))(made.weights, state, made.config, 16)
    found = [
        [int(first.tokens[row, 0]), *texts.tokens[row, : texts.n_tokens[row]].tolist()] for row in range(3)
    ]
    assert found == expected and texts.steps.tolist() == [0, 5, 2]
    assert state.cache.lengths.tolist() == [3, 22, 3]


def test_parts_of_a_batch_at_once(monkeypatch):
    made = generator("small")
    requests = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (1, 6, 3)]
    prompts = [[1, 2, 3], [4] * 17, [5]]
    expected, before = made.generate(prompts, requests), dataclasses.replace(made.statistics)
    assert made._parts(3) == 1 and made._parts(100) <= 100 // PART
    monkeypatch.setattr(made, "_parts", lambda texts: 2)
    assert [c.tokens for c in made.generate(prompts, requests)] == [c.tokens for c in expected]
    # All but the first token of each are counted.
    assert (made.statistics.tokens - before.tokens, made.statistics.steps - before.steps) == (7, 7)


def test_the_context_ends_the_text():
    limit = CONFIGS["v3"].max_seq_len
    (found,) = generator("v3").generate([[1] * (limit - 3)], dataclasses.replace(GREEDY, max_new_tokens=50))
    assert len(found.tokens) == 3 and found.finish_reason == "length"


@functools.cache
def speaker():
    config = changed(vocab_size=264, n_layers=1, moe={"n_dense_layers": 1}, max_seq_len=64)
    from dsv3_jax.model import Transformer

    return Generator(config, make_variables(Transformer(config)), ByteTokenizer())


def test_stop_strings():
    params = SamplingParams(max_new_tokens=30, temperature=1.0, seed=5, ignore_eos=True)
    free = "".join(piece.text for piece in speaker().stream("ab", params))
    stop = free[7:9]
    (found,) = speaker().generate(["ab"], dataclasses.replace(params, stop_strings=(stop,)))
    assert found.text == free[: free.index(stop)] and found.finish_reason == "stop"


@given(
    text=st.text(max_size=30), stops=st.lists(st.text(min_size=1, max_size=3), max_size=2), cut=st.booleans()
)
def test_text_stream(text, stops, cut):
    if cut and len(text) > 3:
        stops = [*stops, text[1:3]]
    tokenizer = ByteTokenizer()
    text = text.encode("utf-8", "replace").decode()
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(int(token)) for token in tokenizer.encode(text)] + [stream.finish()]
    # The first stop string to be complete ends the text.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text
    if ends:
        complete = min(end for end, _ in ends)
        expected = text[: min(start for end, start in ends if end == complete)]
    assert "".join(pieces) == expected
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1] * 64, "64 tokens.*max_seq_len is 64.*at most 63"),
        ([1, 29], "token 29.*vocab_size is 29"),
        ([-1], "token -1"),
        ("text", "no tokenizer"),
    ],
)
def test_bad_prompts_are_named(prompt, message):
    with pytest.raises(RequestError, match=message):
        generator("v3").generate([prompt])


def test_what_does_not_fit_the_model_is_named():
    with pytest.raises(RequestError, match="3 drafts.*depth is 2"):
        Generator(CONFIGS["v3"], variables("v3"), speculate=3)
    with pytest.raises(RequestError, match="261 tokens.*vocab_size is 29"):
        Generator(CONFIGS["v3"], variables("v3"), ByteTokenizer())
    with pytest.raises(RequestError, match="2 prompts and 1 parameters"):
        generator("v3").generate([[1], [2]], [GREEDY])
    with pytest.raises(RequestError, match="no prompts"):
        generator("v3").generate([])


def test_logits_that_are_not_finite_are_an_error():
    broken = jax.tree.map(lambda x: x, variables("v3"))
    broken["params"]["head"] = jnp.full_like(broken["params"]["head"], np.nan)
    with pytest.raises(RequestError, match="not finite"):
        Generator(CONFIGS["v3"], broken, chunk=16).generate([[1, 2]] * 3, GREEDY)

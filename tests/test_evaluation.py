"""Likelihoods against the float64 oracle, text by text; files that are not what they should be."""

import functools
import json
import sys
import types

import numpy as np
import pytest

from dsv3_jax.data.tokenizers import ByteTokenizer
from dsv3_jax.evaluation import Harness, Scorer, for_lm_eval, multiple_choice, perplexity
from dsv3_jax.generation import Generator, RequestError
from dsv3_jax.model import Transformer
from tests.model.test_transformer import changed, make_variables
from tests.model.translate import to_oracle
from tests.oracles import transformer

MODEL = changed(vocab_size=264, n_layers=1, moe={"n_dense_layers": 1}, mtp={"depth": 0}, max_seq_len=24)
EOS = ByteTokenizer.eos_id


@functools.cache
def variables():
    return make_variables(Transformer(MODEL))


@functools.cache
def scorer():
    return Scorer(MODEL, variables(), ByteTokenizer(), batch_size=4)


@functools.cache
def oracle_tree():
    return to_oracle(variables()["params"], variables()["router"], MODEL)


def log_probs(tokens):
    """Of tokens[1:], each given those before it, in float64."""
    logits = transformer.forward(oracle_tree(), np.array(tokens[:-1]), MODEL).logits
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(tokens) - 1), tokens[1:]]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_likelihoods():
    pairs = [("ab", "cd"), ("x", "yz yz"), ("a long context", " b"), ("spaces  ", "q")]
    encoded = [scorer().encode_pair(*pair) for pair in pairs]
    found = scorer().score(encoded)
    for (context, continuation), one in zip(pairs, found, strict=True):
        text = [EOS, *(context + continuation).encode()]
        count = len(text) - 1 - len(context.rstrip())
        np.testing.assert_allclose(one.log_prob, log_probs(text)[-count:].sum(), rtol=1e-5)
        assert one.tokens == count


def test_perplexity(tmp_path):
    texts = ["short", "é and more than one window of text, by some", "", "again"]
    found = perplexity(scorer(), write(tmp_path / "x.jsonl", [{"body": text} for text in texts]), "body")
    total = tokens = 0.0
    for text in texts:
        ids = [EOS, *text.encode()]
        # The first window, then halves with what fits before them.
        end = min(len(ids), 25 if len(ids) <= 25 else 24)
        total += log_probs(ids[:end]).sum() if text else 0
        while end < len(ids):
            start, end = end, min(end + 12, len(ids))
            total += log_probs(ids[max(0, end - 25) : end])[-(end - start) :].sum()
        tokens += len(ids) - 1
    size = sum(len(text.encode()) for text in texts)
    assert found["tokens"] == tokens and found["documents"] == 4
    np.testing.assert_allclose(found["nats_per_token"], -total / tokens, rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], np.exp(-total / tokens), rtol=1e-4)
    np.testing.assert_allclose(found["bits_per_byte"], -total / np.log(2) / size, rtol=1e-5)


def test_multiple_choice(tmp_path):
    rng = np.random.default_rng(0)
    rows, right, per_byte = [], 0, 0
    for i in range(6):
        choices = ["".join(map(chr, rng.integers(97, 110, n))) for n in (1, 4, 7)]
        scores = [log_probs([EOS, *b"q", *choice.encode()])[-len(choice) :].sum() for choice in choices]
        answer = int(np.argmax(scores)) if i < 4 else int(np.argmin(scores))
        rows.append({"question": "q", "choices": choices, "answer": answer})
        right += np.argmax(scores) == answer
        per_byte += np.argmax(np.array(scores) / [1, 4, 7]) == answer
    found = multiple_choice(scorer(), write(tmp_path / "x.jsonl", rows))
    assert found == {"questions": 6, "accuracy": right / 6, "accuracy_per_byte": per_byte / 6}
    assert right == 4


def test_the_harness_methods():
    generator = Generator(MODEL, variables(), ByteTokenizer())
    harness = Harness(scorer(), generator)

    def request(*args):
        return types.SimpleNamespace(args=args)

    ((value, greedy),) = harness.loglikelihood([request("ab", "cd")])
    np.testing.assert_allclose(value, log_probs([EOS, *b"abcd"])[-2:].sum(), rtol=1e-5)
    assert not greedy
    (value,) = harness.loglikelihood_rolling([request("abcd")])
    np.testing.assert_allclose(value, log_probs([EOS, *b"abcd"]).sum(), rtol=1e-5)
    options = {"until": ["\n\n"], "max_gen_toks": 6}
    (text,) = harness.generate_until([request("some context that is too long", options)])
    ids = [*b"some context that is too long"][-18:]  # What leaves room for 6 tokens.
    for _ in range(6):
        ids.append(int(transformer.forward(oracle_tree(), np.array(ids), MODEL).logits[-1].argmax()))
    assert EOS not in ids and text == ByteTokenizer().decode(ids[18:])


def test_the_adapter_is_a_model_of_lm_eval(monkeypatch):
    """With the package's own base class where it is installed, and with one like it where not."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError:
        LM = type("LM", (), {})
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", LM, raising=False)
    names = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    harness = object.__new__(Harness)  # Without a model.
    for name in names:
        monkeypatch.setattr(harness, name, lambda requests, n=name: (n, requests), raising=False)
    adapter = for_lm_eval(harness)
    assert isinstance(adapter, LM)
    assert [getattr(adapter, n)([1, 2]) for n in names] == [(n, [1, 2]) for n in names]


@pytest.mark.parametrize(
    ("content", "function", "message"),
    [
        ("{", perplexity, "x.jsonl:1 is not JSON"),
        ("[1]", perplexity, "not a JSON object"),
        ('{"a": 1}', perplexity, "no text in its field 'text'"),
        ("", perplexity, "has no text"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', multiple_choice, "at least two"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', multiple_choice, "from 0"),
        ("", multiple_choice, "no question"),
    ],
)
def test_bad_files_are_named(tmp_path, content, function, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError, match=message):
        function(scorer(), path)


def test_what_cannot_be_scored():
    with pytest.raises(RequestError, match="0 tokens"):
        scorer().score([([1], [])])
    with pytest.raises(RequestError, match="max_seq_len = 24"):
        scorer().score([([1], [2] * 25)])

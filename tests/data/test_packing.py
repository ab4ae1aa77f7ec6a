"""Packing against the obvious list-based stream, and fill-in-the-middle by undoing it."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_jax.data.corpus import Documents
from dsv3_jax.data.packing import PackedSequences, TokenStream
from dsv3_jax.data.tokenizers import FimIds

EOS, FIM = 100, FimIds(101, 102, 103)

texts_ = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=6)


def _documents(texts: list[list[int]]) -> Documents:
    """Documents in memory, named d0, d1, ..."""
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    tokens = np.array([token for text in texts for token in text], np.uint16)
    return Documents(tokens, starts, lengths, np.arange(len(texts)), lambda number: f"d{number}")


def _stream(texts, **options):
    return TokenStream(_documents(texts), eos_id=EOS, fim_ids=FIM, **options)


def _naive(texts, n, seq_len, mask_documents):
    """Sequences of the unshuffled stream, by walking lists token by token."""
    stream, owner, visit = [], [], 0
    while len(stream) < n * seq_len + 1:
        for text in texts:
            stream += [*text, EOS]
            owner += [visit] * (len(text) + 1)
            visit += 1
    rows = []
    for i in range(n):
        row = {"tokens": [], "targets": [], "segment_ids": [], "positions": [], "loss_mask": []}
        segment, position = 0, 0
        for t in range(i * seq_len, (i + 1) * seq_len):
            begins = t == i * seq_len or owner[t] != owner[t - 1]
            segment, position = (segment + 1, 0) if begins else (segment, position + 1)
            row["tokens"].append(stream[t])
            row["targets"].append(stream[t + 1])
            row["segment_ids"].append(segment if mask_documents else 1)
            row["positions"].append(position if mask_documents else t - i * seq_len)
            row["loss_mask"].append(not mask_documents or owner[t] == owner[t + 1])
        rows.append(row)
    return rows


@given(texts_, st.integers(1, 25), st.booleans(), st.permutations(range(7)))
@example([[1]], 25, True, range(7))  # A sequence of many epochs of one document.
def test_sequences_are_the_naive_ones(texts, seq_len, mask_documents, order):
    rows = _naive(texts, 7, seq_len, mask_documents)
    sequences = PackedSequences(_stream(texts, shuffle=False), seq_len, mask_documents=mask_documents)
    for i in order:  # Any order of access.
        row = sequences[i]
        assert {name: value.tolist() for name, value in row.items()} == rows[i]
        assert {name: value.dtype.name for name, value in row.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "segment_ids": "int32",
            "positions": "int32",
            "loss_mask": "bool",
        }


def _epochs(texts, seed, n, rate=0.0):
    """The first `n` epochs as lists of documents, split at eos, in the stream's order."""
    stream = _stream(texts, seed=seed, fim_rate=rate)
    tokens, ordinals = stream.read(0, n * (stream.epoch_tokens + 3 * len(texts)))
    documents = [[]]
    for token in tokens.tolist():
        documents[-1].append(token)
        if token == EOS:
            documents.append([])
    assert ordinals.tolist() == [k for k, document in enumerate(documents, 1) for _ in document]
    return [documents[e * len(texts) : (e + 1) * len(texts)] for e in range(n)]


@given(texts_, st.integers(0, 2**64), st.integers(1, 4))
def test_every_epoch_has_every_document_once(texts, seed, n):
    for epoch in _epochs(texts, seed, n):
        assert Counter(map(tuple, epoch)) == Counter((*text, EOS) for text in texts)


def test_order_differs_by_epoch_and_seed_only():
    texts = [[i] for i in range(20)]
    first = _epochs(texts, 1, 2)
    assert first == _epochs(texts, 1, 2)
    assert first[0] != first[1]
    assert first[0] != _epochs(texts, 2, 1)[0]


def _undo(document):
    """The text of a document, and whether it was rearranged."""
    assert document[-1] == EOS
    if document[0] != FIM.prefix:
        return tuple(document[:-1]), False
    suffix, middle = document.index(FIM.suffix), document.index(FIM.middle)
    assert suffix < middle
    prefix, tail = document[1:suffix], document[suffix + 1 : middle]
    return tuple(prefix + document[middle + 1 : -1] + tail), True


@given(texts_, st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1))
def test_fim_is_undone_by_prefix_middle_suffix(texts, seed, rate):
    done = 0
    for e, epoch in enumerate(_epochs(texts, seed, 5, rate)):
        undone = [_undo(document) for document in epoch]
        assert Counter(text for text, _ in undone) == Counter(map(tuple, texts))
        done += sum(fim for _, fim in undone)
        # The rate is kept to 32 binary digits, so the count may round to the other side of an integer.
        assert abs(done - int(Fraction(rate) * len(texts) * (e + 1))) <= 1
        if rate in (0.0, 0.25, 0.5, 1.0):
            assert done == int(Fraction(rate) * len(texts) * (e + 1))


def test_fim_cuts_are_uniform():
    cuts = Counter()
    for document in _epochs([list(range(9))] * 4000, 3, 1, 1.0)[0]:
        suffix = document.index(FIM.suffix)
        middle = document.index(FIM.middle)
        cuts[suffix - 1, 9 - (middle - suffix - 1)] += 1
    assert set(cuts) == {(a, b) for a in range(10) for b in range(a, 10)}
    # Two uniform places in 0..9, sorted: each pair a < b has 2/100 of them, each a = b 1/100.
    chi2 = sum(
        (n - 4000 * (2 - (a == b)) / 100) ** 2 / (4000 * (2 - (a == b)) / 100) for (a, b), n in cuts.items()
    )
    assert chi2 < 110  # 54 degrees of freedom: above this once in 100,000 times.


@given(texts_, st.integers(0, 9), st.floats(0, 1), st.integers(0, 10**18), st.integers(1, 40))
@settings(max_examples=60)
def test_reading_anywhere_agrees_with_reading_around_it(texts, seed, rate, start, length):
    # Random access far away, where only exact integers find the epoch.
    stream = _stream(texts, seed=seed, fim_rate=rate)
    around, _ = stream.read(max(0, start - 30), start + length + 30)
    tokens, _ = _stream(texts, seed=seed, fim_rate=rate).read(start, start + length)
    assert tokens.tolist() == around[min(30, start) :][:length].tolist()


@given(texts_, st.integers(1, 12))
def test_one_pass_reads_each_whole_window_once(texts, seq_len):
    stream = _stream(texts, shuffle=False)
    windows = PackedSequences(stream, seq_len)
    n = windows.per_pass
    assert n == max(0, (sum(len(text) + 1 for text in texts) - 1) // seq_len)
    if n:
        once = PackedSequences(stream, seq_len, one_pass=True)
        rows = [tuple(once[i]["tokens"]) + tuple(once[i]["targets"]) for i in range(n)]
        assert Counter(rows) == Counter(
            tuple(windows[i]["tokens"]) + tuple(windows[i]["targets"]) for i in range(n)
        )
        assert all(np.array_equal(once[i]["tokens"], once[n + i]["tokens"]) for i in range(n))


@given(texts_, st.integers(1, 12), st.integers(0, 2**64), st.integers(0, 5))
def test_mixed_windows_are_each_read_once_and_stay_in_their_stretch(texts, seq_len, seed, stretch):
    stream = _stream(texts)
    plain, mixed = PackedSequences(stream, seq_len), PackedSequences(stream, seq_len, mix_seed=seed)
    n = max(1, plain.per_pass)
    indices = range(stretch * n, (stretch + 1) * n)
    plain_rows = Counter(tuple(plain[i]["tokens"]) for i in indices)
    assert Counter(tuple(mixed[i]["tokens"]) for i in indices) == plain_rows


def test_neighbouring_sequences_are_of_different_documents():
    stream = _stream([[n] * 99 for n in range(100)])
    mixed = PackedSequences(stream, 10, mix_seed=0)
    neighbours = [set(mixed[i]["tokens"]) & set(mixed[i + 1]["tokens"]) - {EOS} for i in range(500)]
    # Windows of ten tokens of documents of a hundred: in order, nine of ten neighbours would share one.
    assert sum(map(bool, neighbours)) < 25


def test_describe_names_the_documents():
    sequences = PackedSequences(_stream([[1] * 9, [2] * 9, [3] * 9, [4] * 9], shuffle=False), 10)
    assert sequences.describe(0, 1) == "sequences 0 to 0 (epoch 0): d0, d1"  # d1 has the last target.
    assert sequences.describe(0, 4) == "sequences 0 to 3 (epochs 0 to 1): d0, d1, d2 and 1 more"
    assert (
        sequences.describe(4 * 10**9, 4 * 10**9 + 1)
        == f"sequences {4 * 10**9} to {4 * 10**9} (epoch {10**9}): d0, d1"
    )


def test_negative_sequence_is_refused():
    with pytest.raises(IndexError, match="from 0, not -1"):
        PackedSequences(_stream([[1]]), 4)[-1]

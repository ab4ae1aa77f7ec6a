"""The bigram baseline against dictionaries of counts."""

import math
from collections import Counter

import pytest

from dsv3_jax.data.bigram import bigram_cross_entropy
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.data.loader import Loader
from dsv3_jax.data.packing import TokenStream

TEXTS = ["the cat sat on the mat. " * (i % 4 + 1) + chr(97 + i) * 3 for i in range(20)]


def _oracle(config, n, seq_len, alpha, max_tokens):
    corpus = open_corpus(config)
    stream = TokenStream(corpus.split(config.validation_fraction)[0], eos_id=corpus.tokenizer.eos_id)
    train = stream.read(0, min(stream.epoch_tokens, max_tokens))[0].tolist()
    pairs, lasts = Counter(zip(train, train[1:], strict=False)), Counter(train[:-1])
    batch = Loader(config, split="validation", seq_len=seq_len, seed=3).take(n)
    total = count = 0
    for last, target, keep in zip(
        *(batch[k].ravel().tolist() for k in ("tokens", "targets", "loss_mask")), strict=True
    ):
        if keep:
            total -= math.log(
                (pairs[last, target] + alpha) / (lasts[last] + alpha * corpus.tokenizer.vocab_size)
            )
            count += 1
    return total / count


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("max_tokens", [150, 10**8])
def test_is_the_dictionary_one(make_config, monkeypatch, mask_documents, chunk, max_tokens):
    monkeypatch.setattr("dsv3_jax.data.bigram._CHUNK", chunk)
    config = make_config(TEXTS, mask_documents=mask_documents, fim_rate=0.5)
    for n in (3, 40):  # 40 sequences are more than one pass.
        got = bigram_cross_entropy(config, seq_len=12, n_sequences=n, alpha=0.3, max_tokens=max_tokens)
        # Equal but for the order of a few hundred float64 additions.
        assert got == pytest.approx(_oracle(config, n, 12, 0.3, max_tokens), rel=1e-12)

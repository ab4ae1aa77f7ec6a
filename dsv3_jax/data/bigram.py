"""What a bigram model makes of the same text: the loss that a run must beat to have learned anything."""

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import open_corpus
from dsv3_jax.data.loader import split_sequences
from dsv3_jax.data.packing import PackedSequences, TokenStream

_CHUNK = 1 << 20  # Training tokens counted at once.


def bigram_cross_entropy(
    config: DataConfig,
    *,
    seq_len: int,
    n_sequences: int,
    alpha: float = 0.1,
    max_tokens: int = 100_000_000,
) -> float:
    """Cross-entropy, in nats a token, of a smoothed bigram model on the first validation sequences.

    The model is p(next | last) = (count(last, next) + alpha) / (count(last) + alpha * vocabulary), counted on
    the training documents (without FIM). It is judged on just the targets that a
    validation `Loader` gives, wherever the loss mask is True.

    Args:
      n_sequences: how many validation sequences; past the end of the split they repeat, as the loader's do.
      alpha: added to every count.
      max_tokens: of a larger corpus, only so many training tokens (of documents in random order) count.
    """
    corpus = open_corpus(config)
    evaluated, train = (
        split_sequences(config, corpus, split=split, seq_len=seq_len, seed=0)
        for split in ("validation", "train")
    )
    # A stream of its own: in random order, so that a part stands for the whole, and without FIM.
    counted = TokenStream(train.stream.documents, eos_id=corpus.tokenizer.eos_id)
    n_tokens = min(counted.epoch_tokens, max_tokens)
    return _cross_entropy(counted, n_tokens, evaluated, n_sequences, corpus.tokenizer.vocab_size, alpha)


def _cross_entropy(
    train: TokenStream,
    n_tokens: int,
    evaluated: PackedSequences,
    n_sequences: int,
    vocab_size: int,
    alpha: float,
) -> float:
    # Only pairs that are asked for are counted, so memory is that of the questions, whatever the vocabulary.
    questions = []
    for i in range(n_sequences):
        row = evaluated[i]
        pairs = row["tokens"].astype(np.int64) * vocab_size + row["targets"]
        questions.append(pairs[row["loss_mask"]])
    pairs, times = np.unique(np.concatenate(questions), return_counts=True)
    pair_counts = np.zeros(len(pairs), np.int64)
    last_counts = np.zeros(vocab_size, np.int64)
    for start in range(0, n_tokens - 1, _CHUNK):
        tokens, _ = train.read(start, min(start + _CHUNK + 1, n_tokens))
        last = tokens[:-1].astype(np.int64)
        last_counts += np.bincount(last, minlength=vocab_size)
        seen, counts = np.unique(last * vocab_size + tokens[1:], return_counts=True)
        place = np.minimum(np.searchsorted(pairs, seen), len(pairs) - 1)
        known = pairs[place] == seen
        pair_counts[place[known]] += counts[known]
    probability = (pair_counts + alpha) / (last_counts[pairs // vocab_size] + alpha * vocab_size)
    return float(-(times * np.log(probability)).sum() / times.sum())

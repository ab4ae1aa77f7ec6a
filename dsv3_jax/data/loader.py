"""Batches for one process, read ahead in threads by Grain, from an exact position."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Corpus, Documents, open_corpus
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.packing import PackedSequences, TokenStream
from dsv3_jax.data.tokenizers import Tokenizer

_READ_AHEAD_BYTES = 64 << 20  # What Grain may hold ready, so that long sequences don't fill the memory ...
_READ_AHEAD_MOST = 512  # ... and so many sequences at most.
_BYTES_A_TOKEN = 17  # Four int32 and a bool.


class Loader:
    """The sequences of one split, and the place in them.

    Sequence i is the same whatever the number of processes: process p of P reads the global sequences
    congruent to p modulo P. The training split goes on for ever, each epoch in a new order; the
    validation split is the sequences of one pass without fill-in-the-middle, in one fixed random order (so
    that a few of them stand for all), repeated.

    Args:
      config: where text comes from.
      split: "train" or "validation".
      seq_len: inputs a sequence.
      seed: decides the order of training documents and fill-in-the-middle.
      process_index, process_count: of this process among those that share the batches.
      start: global sequences already consumed.

    Attributes:
      tokenizer: of the corpus.
      sequences: random access to every sequence, `PackedSequences`.
      per_pass: whole sequences in one pass over the split (for training: in an epoch without FIM).

    Raises:
      DataError: the source, tokenizer or cache can't be used, or the split is shorter than a sequence.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        split: str,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index = {process_index} of process_count = {process_count}")
        self._split, self._seed = split, seed
        self._process_index, self._process_count = process_index, process_count
        self._corpus = open_corpus(config)
        self.tokenizer: Tokenizer = self._corpus.tokenizer
        self.sequences = split_sequences(config, self._corpus, split=split, seq_len=seq_len, seed=seed)
        self.per_pass = self.sequences.per_pass
        self._fingerprint = {
            "data.source": f"{len(self._corpus)} documents, {len(self._corpus.tokens)} tokens, "
            f"sha256 {self._corpus.content[:16]}",
            "data.tokenizer": self.tokenizer.identity,
            "data.validation_fraction": config.validation_fraction,
            "data.fim_rate": config.fim_rate,
            "train.seq_len": seq_len,
            "train.seed": seed,
        }
        self._iterator = _read_ahead(self.sequences, process_index, process_count, config.read_threads)
        self.seek(start)

    def take(self, n: int) -> dict[str, np.ndarray]:
        """This process's rows of the next `n` global sequences.

        Returns:
          The arrays of `PackedSequences`, stacked: [n / process_count, seq_len], in order of sequence.

        Raises:
          ValueError: `n` isn't a positive multiple of the number of processes.
        """
        if n <= 0 or n % self._process_count:
            raise ValueError(f"{n} sequences can't be shared by {self._process_count} processes")
        rows = [next(self._iterator) for _ in range(n // self._process_count)]
        self._position += n
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @property
    def position(self) -> int:
        """Global sequences consumed."""
        return self._position

    def seek(self, position: int) -> None:
        """Goes to any position, from 0; nothing in between is read."""
        if position < 0:
            raise ValueError(f"position = {position}: positions count from 0")
        # The first global index at or after `position` that is this process's, in steps of process_count.
        step = -((self._process_index - position) // self._process_count)
        self._iterator.set_state({"next_index": step})
        self._position = position

    def get_state(self) -> dict[str, Any]:
        """The position and what it refers to, JSON-able; the same in every process."""
        return {"position": self._position, "split": self._split, "data": dict(self._fingerprint)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called, by any number of processes.

        Raises:
          DataError: the position refers to other data; it names what changed.
        """
        if state["split"] != self._split:
            raise ValueError(f'the state is of split "{state["split"]}", this is "{self._split}"')
        saved = state["data"]
        for field, value in self._fingerprint.items():
            if saved.get(field) != value:
                was = f"the saved position is of other data, with {saved.get(field)!r}"
                raise DataError(field, value, f"{was}; restore that, or start anew")
        self.seek(state["position"])

    def describe(self, first: int, last: int) -> str:
        """Which documents the global sequences [first, last) hold, in a line for an error message."""
        return self.sequences.describe(first, last)

    def close(self) -> None:
        """Ends the reading threads."""
        self._iterator.close()


def split_sequences(
    config: DataConfig, corpus: Corpus, *, split: str, seq_len: int, seed: int
) -> PackedSequences:
    """The sequences of one split, `split` being "train" or "validation"."""
    if split not in ("train", "validation"):
        raise ValueError(f'split = "{split}": use "train" or "validation"')
    documents: Documents = corpus.split(config.validation_fraction)[split == "validation"]
    training = split == "train"
    tokenizer = corpus.tokenizer
    if training and config.fim_rate > 0 and tokenizer.fim_ids is None:
        raise DataError("data.fim_rate", config.fim_rate, "the tokenizer has no FIM tokens; use 0")
    stream = TokenStream(
        documents,
        eos_id=tokenizer.eos_id,
        seed=seed,
        shuffle=training,
        fim_rate=config.fim_rate if training else 0.0,
        fim_ids=tokenizer.fim_ids,
    )
    sequences = PackedSequences(
        stream,
        seq_len,
        mask_documents=config.mask_documents,
        one_pass=not training,
        mix_seed=seed if training else None,
    )
    if sequences.per_pass == 0:
        raise DataError(
            "data.source",
            config.source,
            f"its {split} split has {stream.epoch_tokens} tokens, and a sequence needs {seq_len + 1}; give"
            " more text, a shorter train.seq_len, or another data.validation_fraction",
        )
    return sequences


@dataclass(frozen=True)
class _Rows:
    """The sequences as Grain's random-access source; practically without end."""

    sequences: PackedSequences

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.sequences[index]


def _read_ahead(sequences: PackedSequences, process_index: int, process_count: int, threads: int) -> Any:
    # Imported here: it takes about a second, which describing or checking data needn't spend.
    import grain

    ready = _READ_AHEAD_BYTES // (_BYTES_A_TOKEN * sequences.seq_len)
    options = grain.ReadOptions(
        num_threads=threads,
        prefetch_buffer_size=min(max(ready, 2 * threads), _READ_AHEAD_MOST) if threads else 0,
    )
    dataset = grain.MapDataset.source(_Rows(sequences))[process_index::process_count]
    return iter(dataset.to_iter_dataset(options))

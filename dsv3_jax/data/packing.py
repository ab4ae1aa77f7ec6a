"""Documents as one endless stream of tokens, and the stream as sequences.

The stream visits every document once an epoch, in an order that (seed, epoch) alone decides, and puts
the end-of-text token after each. Window w is stream tokens [w*S, w*S + S]: S inputs, and as targets the
same shifted by one. Training reads every window once, in an order that the seed alone decides. So the
place in the data is one integer, the number of sequences read, and any sequence can be made alone.
"""

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dsv3_jax.data.corpus import Documents
from dsv3_jax.data.hashing import keys_at, random_order
from dsv3_jax.data.tokenizers import FimIds

# What a key is for: the documents' order, who is rearranged and where, the order of validation.
_ORDER, _FIM, _CUT, _WINDOW = range(4)
_RATE_ONE = 1 << 32  # A rate of one in fixed point: the start of an epoch is then exact integer arithmetic.
_KEPT_EPOCHS = 4
_LONGEST_STRETCH = 1 << 18  # Windows that are mixed among themselves.


@dataclass(frozen=True)
class _Epoch:
    """One visit to all documents, by rank (the order of the visit)."""

    number: int
    start: int  # In the stream.
    documents: Int64[np.ndarray, "n"]
    rearranged: Bool[np.ndarray, "n"]
    ends: Int64[np.ndarray, "n"]  # Where each document ends, from the epoch's start, its eos included.


@dataclass(frozen=True)
class _Span:
    """The part of a stretch of the stream that lies in one epoch."""

    epoch: _Epoch
    first: int  # Both from the epoch's start.
    last: int
    ranks: Int64[np.ndarray, "k"]  # The documents that it touches.


class TokenStream:
    """The endless stream of a set of documents.

    Fill-in-the-middle (DeepSeek-V3 §4.1; Bavarian et al., arXiv 2207.14255): a `fim_rate` of the documents,
    others in each epoch, is cut at two random tokens and becomes

        <prefix> prefix <suffix> suffix <middle> middle <eos>

    before packing. The documents so treated by the end of epoch e are exactly floor(rate * n * (e + 1)).

    Finding a document is a binary search. Memory is 17 bytes a document for each of the last four epochs
    in use, beside 24 bytes a document in `documents`; the tokens stay on disk.

    Args:
      documents: what to read; each has at least one token.
      eos_id: put after every document.
      seed: any non-negative integer.
      shuffle: whether each epoch has an order of its own; else the documents' own order.
      fim_rate: in [0, 1].
      fim_ids: needed when `fim_rate` is above 0.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        eos_id: int,
        seed: int = 0,
        shuffle: bool = True,
        fim_rate: float = 0.0,
        fim_ids: FimIds | None = None,
    ):
        self.documents = documents
        self.epoch_tokens = int(documents.lengths.sum()) + len(documents)  # Of an epoch without FIM.
        self._eos_id, self._seed, self._shuffle = eos_id, seed, shuffle
        self._fim_ids = fim_ids or FimIds(eos_id, eos_id, eos_id)  # Never read at a rate of 0.
        self._fim_step = len(documents) * round(fim_rate * _RATE_ONE)  # Rearranged an epoch, fixed point.
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
        """Stream tokens [start, stop), and for each the document it is of, counted from 1 in this stretch."""
        tokens = np.empty(stop - start, np.int32)
        ordinals = np.empty(stop - start, np.int32)
        done = documents = 0
        for span in self._spans(start, stop):
            part = slice(done, done + span.last - span.first)
            tokens[part], ordinals[part] = self._read_span(span)
            ordinals[part] += documents + 1
            done, documents = part.stop, documents + len(span.ranks)
        return tokens, ordinals

    def documents_in(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(epoch, index in `documents`) of every document in [start, stop), in order."""
        for span in self._spans(start, stop):
            for document in span.epoch.documents[span.ranks]:
                yield span.epoch.number, int(document)

    def _read_span(self, span: _Span) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the span, and the place in `span.ranks` of the document of each."""
        epoch, ranks = span.epoch, span.ranks
        documents = epoch.documents[ranks]
        ends = epoch.ends[ranks]
        lengths = self.documents.lengths[documents]
        begins = ends - lengths - 1 - 3 * epoch.rearranged[ranks]
        pieces = np.minimum(ends, span.last) - np.maximum(begins, span.first)
        which = np.repeat(np.arange(len(ranks), dtype=np.int32), pieces)
        within = np.arange(span.first, span.last) - begins[which]
        length = lengths[which]
        # A token is an offset in its document, or a special token.
        offset, special = within, np.where(within == length, self._eos_id, -1)
        fim = epoch.rearranged[ranks]
        if fim.any():
            a, b = self._cuts(epoch.number, documents)
            moved, marks = self._fill_in_the_middle(within, length, a[which], b[which])
            offset = np.where(fim[which], moved, offset)
            special = np.where(fim[which], marks, special)
        source = self.documents.starts[documents][which] + np.where(special < 0, offset, 0)
        return np.where(special < 0, self.documents.tokens[source].astype(np.int32), special), which

    def _cuts(self, epoch: int, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the middle of each document begins and ends: two uniform places, sorted."""
        places = self.documents.lengths[documents].astype(np.uint64) + np.uint64(1)
        one, other = (keys_at(documents, self._seed, epoch, _CUT, k) % places for k in (0, 1))
        return np.minimum(one, other).astype(np.int64), np.maximum(one, other).astype(np.int64)

    def _fill_in_the_middle(
        self, within: np.ndarray, length: np.ndarray, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """At place `within` of a rearranged document: the offset in its text; the special token, or -1."""
        suffix, middle, eos = a + 1, a + 2 + length - b, length + 3  # Where the special tokens stand.
        offset = np.select(
            [within < suffix, within < middle], [within - 1, within - suffix - 1 + b], within - middle - 1 + a
        )
        special = np.select(
            [within == 0, within == suffix, within == middle, within == eos],
            [*self._fim_ids, self._eos_id],
            -1,
        )
        return offset, special

    def _spans(self, start: int, stop: int) -> Iterator[_Span]:
        number = self._epoch_at(start)
        while start < stop:
            epoch = self._epoch(number)
            first = start - epoch.start
            last = min(stop - epoch.start, int(epoch.ends[-1]))
            low, high = np.searchsorted(epoch.ends, [first, last - 1], "right")
            yield _Span(epoch, first, last, np.arange(low, high + 1))
            start, number = epoch.start + last, number + 1

    def _rearranged_before(self, epoch: int) -> int:
        return epoch * self._fim_step // _RATE_ONE

    def _epoch_start(self, epoch: int) -> int:
        return epoch * self.epoch_tokens + 3 * self._rearranged_before(epoch)

    def _epoch_at(self, position: int) -> int:
        # The average length of an epoch gives a number that is right, or one too low: rounding.
        number = position * _RATE_ONE // (self.epoch_tokens * _RATE_ONE + 3 * self._fim_step)
        while self._epoch_start(number + 1) <= position:
            number += 1
        return number

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:  # Read by several threads.
            if number not in self._epochs:
                while len(self._epochs) >= _KEPT_EPOCHS:
                    del self._epochs[min(self._epochs)]
                self._epochs[number] = self._make_epoch(number)
            return self._epochs[number]

    def _make_epoch(self, number: int) -> _Epoch:
        n = len(self.documents)
        order = random_order(n, self._seed, number, _ORDER) if self._shuffle else np.arange(n)
        rearranged = np.zeros(n, bool)
        count = self._rearranged_before(number + 1) - self._rearranged_before(number)
        if count:
            rearranged[random_order(n, self._seed, number, _FIM)[:count]] = True
        ends = np.cumsum(self.documents.lengths[order] + 1 + 3 * rearranged)
        return _Epoch(number, self._epoch_start(number), order, rearranged, ends)


class PackedSequences:
    """Fixed-length training sequences over a stream; `[i]` for any i >= 0.

    Args:
      stream: what to cut.
      seq_len: S, the number of inputs and of targets.
      mask_documents: whether documents in a sequence are kept apart.
      one_pass: read the whole sequences of the first pass only, in one fixed random order, again and again.
        Else the windows of the endless stream, each once.
      mix_seed: decides the order of those windows, so that a batch is no run of neighbours of one document:
        they are mixed within stretches of one pass, or of 2^18 windows if a pass is longer. None: window i.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        *,
        mask_documents: bool = False,
        one_pass: bool = False,
        mix_seed: int | None = None,
    ):
        self.stream, self.seq_len, self.mask_documents = stream, seq_len, mask_documents
        self._windows = random_order(self.per_pass, _WINDOW) if one_pass else None
        self._mix_seed = mix_seed
        self._stretch = max(1, min(self.per_pass, _LONGEST_STRETCH))
        # Reading threads work at most on two stretches at a time.
        self._mixed = functools.lru_cache(maxsize=3)(self._mixed_stretch)

    @property
    def per_pass(self) -> int:
        """The number of whole sequences in one pass over the documents (without FIM)."""
        return max(0, (self.stream.epoch_tokens - 1) // self.seq_len)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Sequence i, each array of length S:

        - tokens, targets (int32): inputs, and the token after each.
        - segment_ids (int32): all 1; with `mask_documents` 1, 2, 3... by document in this sequence.
        - positions (int32): 0 to S-1; with `mask_documents` from 0 again at each document. A document that
          began in the sequence before counts from the start of this one, as nothing earlier is seen.
        - loss_mask (bool): all True; with `mask_documents` False at each eos, whose target is of the next
          document.
        """
        s = self.seq_len
        first = self._window(i) * s
        stream, segments = self.stream.read(first, first + s + 1)
        positions = np.arange(s, dtype=np.int32)
        if self.mask_documents:
            mask = segments[1:] == segments[:-1]
            starts = np.flatnonzero(np.concatenate([[True], ~mask[:-1]]))
            positions -= starts[segments[:-1] - 1].astype(np.int32)
        else:
            segments, mask = np.ones(s + 1, np.int32), np.ones(s, bool)
        return {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "segment_ids": segments[:-1],
            "positions": positions,
            "loss_mask": mask,
        }

    def describe(self, first: int, last: int) -> str:
        """Which documents sequences [first, last) hold, in a line for an error message."""
        visits: dict[tuple[int, int], None] = {}  # In order, without repeats.
        for window in map(self._window, range(first, last)):
            start = window * self.seq_len
            visits.update(dict.fromkeys(self.stream.documents_in(start, start + self.seq_len + 1)))
        epochs = sorted({epoch for epoch, _ in visits})
        numbers = list(dict.fromkeys(int(self.stream.documents.numbers[document]) for _, document in visits))
        names = ", ".join(self.stream.documents.name(number) for number in numbers[:3])
        more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        when = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
        return f"sequences {first} to {last - 1} ({when}): {names}{more}"

    def _window(self, i: int) -> int:
        if i < 0:
            raise IndexError(f"sequences count from 0, not {i}")
        if self._windows is not None:
            return int(self._windows[i % len(self._windows)])
        if self._mix_seed is None:
            return i
        stretch, place = divmod(i, self._stretch)
        return stretch * self._stretch + int(self._mixed(stretch)[place])

    def _mixed_stretch(self, stretch: int) -> np.ndarray:
        return random_order(self._stretch, self._mix_seed or 0, stretch, _WINDOW)

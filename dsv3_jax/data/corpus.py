"""Documents as token ids, made once and memory-mapped afterwards.

    cache_dir/tokens/<name>/
      tokens.bin       every document's tokens, one after another; uint16, or uint32 for a wide vocabulary
      offsets.bin      int64 [n + 1]: where each document starts
      names.bin, name_offsets.bin   the documents' names in the same way, UTF-8
      manifest.json    what it was made from, and a checksum of each file

Only the pages that are read take memory. Documents without a single token are left out.
"""

import hashlib
import json
import logging
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import cache_root, ensure_folder
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.hashing import random_keys
from dsv3_jax.data.sources import Source, open_source
from dsv3_jax.data.tokenizers import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

_FORMAT = 1
_FILES = ("tokens.bin", "offsets.bin", "names.bin", "name_offsets.bin")
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 4 << 20  # What is tokenised at once: bounds memory.
_CHECKED_BYTES = 256 << 20  # Contents are verified up to here (a fraction of a second), beyond only sizes.
_VALIDATION_WORD = 0x76616C  # Keys the train/validation split.


@dataclass(frozen=True)
class Documents:
    """Some documents of a corpus, by number.

    Attributes:
      tokens: the whole corpus's tokens (memory-mapped).
      starts, lengths: where each of these documents lies in `tokens`.
      numbers: which documents of the corpus these are.
      name: the name of a document of the corpus, from its number.
    """

    tokens: Int[np.ndarray, "n_tokens"]
    starts: Int64[np.ndarray, "n"]
    lengths: Int64[np.ndarray, "n"]
    numbers: Int64[np.ndarray, "n"]
    name: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.starts)


class Corpus:
    """A tokenised source."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        self.content: str = manifest["content"]
        self.tokens = np.asarray(np.memmap(folder / "tokens.bin", manifest["dtype"], "r"))
        self._offsets = np.fromfile(folder / "offsets.bin", np.int64)
        self._name_offsets = np.memmap(folder / "name_offsets.bin", np.int64, "r")
        self._names = np.memmap(folder / "names.bin", np.uint8, "r")

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._offsets) - 1

    def name(self, number: int) -> str:
        first, last = self._name_offsets[number : number + 2]
        return self._names[first:last].tobytes().decode("utf-8", "replace")

    def split(self, validation_fraction: float) -> tuple[Documents, Documents]:
        """(train, validation): a fixed random `validation_fraction` of the documents is held out.

        Which ones depends only on their numbers. Each side has one document at least.
        """
        n = len(self)
        n_validation = min(max(round(n * validation_fraction), 1), n - 1)
        held_out = np.zeros(n, bool)
        held_out[np.argsort(random_keys(n, _VALIDATION_WORD))[:n_validation]] = True
        return self._select(~held_out), self._select(held_out)

    def _select(self, chosen: np.ndarray) -> Documents:
        numbers = np.flatnonzero(chosen)
        starts = self._offsets[:-1][chosen]
        return Documents(self.tokens, starts, self._offsets[1:][chosen] - starts, numbers, self.name)


def open_corpus(config: DataConfig) -> Corpus:
    """The tokenised corpus of `config`, made first if it isn't in the cache, or is damaged or stale.

    Safe with several processes at once and when killed at any moment.

    Raises:
      DataError: the source, the tokenizer or the cache can't be used, or there are fewer than two documents.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    source = open_source(config)
    for problem in source.problems():
        raise DataError(*problem)
    made_from = {"format": _FORMAT, "source": source.identity(), "tokenizer": tokenizer.identity}
    key = hashlib.sha256(f"{source.location} {tokenizer.identity}".encode()).hexdigest()[:16]
    folder = cache_root(config.cache_dir) / "tokens" / key

    def build(new: Path) -> None:
        _tokenise(new, config, source, tokenizer, made_from)

    ensure_folder(folder, build, lambda existing: _fault(existing, made_from))
    return Corpus(folder, tokenizer)


def _tokenise(
    folder: Path, config: DataConfig, source: Source, tokenizer: Tokenizer, made_from: dict[str, Any]
) -> None:
    log.info("tokenising %s", config.source)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    offsets, name_offsets = array("q", [0]), array("q", [0])
    reported = time.monotonic()
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "names.bin", "wb") as names:
        for batch in _batches(source.documents()):
            ids = tokenizer.encode_batch([text for _, text in batch])
            for (name, _), document in zip(batch, ids, strict=True):
                if len(document):
                    tokens.write(document.astype(dtype).tobytes())
                    offsets.append(offsets[-1] + len(document))
                    name_offsets.append(name_offsets[-1] + names.write(name.encode("utf-8", "replace")))
            if time.monotonic() > reported + 10:
                reported = time.monotonic()
                log.info("tokenised %d documents, %d tokens", len(offsets) - 1, offsets[-1])
    if len(offsets) < 3:
        fix = f"has {len(offsets) - 1} documents with text; two are needed, one of them for validation"
        raise DataError("data.source", config.source, fix)
    for name, values in (("offsets.bin", offsets), ("name_offsets.bin", name_offsets)):
        (folder / name).write_bytes(values.tobytes())
    checks = {name: [(folder / name).stat().st_size, _checksum(folder / name)] for name in _FILES}
    manifest = {
        "made_from": made_from,
        "dtype": dtype.name,
        "files": checks,
        "content": hashlib.sha256(f"{checks['tokens.bin']}{checks['offsets.bin']}".encode()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fault(folder: Path, made_from: dict[str, Any]) -> str | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if manifest["made_from"] != made_from:
            return "the text or the tokenizer changed"
        for name in _FILES:
            size, checksum = manifest["files"][name]
            if (folder / name).stat().st_size != size:
                return f"{name} has the wrong size"
            if size <= _CHECKED_BYTES and _checksum(folder / name) != checksum:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it can't be read ({error})"
    return None


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

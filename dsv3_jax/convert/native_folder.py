"""Our folder (see `native`) read back, every byte of it checked."""

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.config_checks import typed
from dsv3_jax.config_reading import ConfigError
from dsv3_jax.convert import mapping
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.mapping import Leaf
from dsv3_jax.convert.mapping import Path as LeafPath
from dsv3_jax.convert.native import FORMAT, MANIFEST, Chunk, chunk_rows, raise_if
from dsv3_jax.convert.safetensors import DTYPES


class NativeFolder:
    """Our folder as a source. Sizes are checked when it is opened, contents as they are read.

    Attributes:
      huggingface: what `write` was given.

    Raises:
      ConversionError: with every problem of a damaged folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        content = self._read_manifest()
        self.huggingface = content["huggingface"]
        self.config = _model(self.path, content["model"])
        self._files: dict[str, tuple[int, int]] = {name: tuple(v) for name, v in content["files"].items()}
        own = mapping.leaves(self.config)
        known = own | {leaf.path: leaf for leaf in map(mapping.scale_leaf, own.values())}
        self.dtypes = {tuple(name.split(".")): DTYPES[kind] for name, kind in content["dtypes"].items()}
        self.leaves: dict[LeafPath, Leaf] = {path: known[path] for path in self.dtypes}
        self._rows = {path: chunk_rows(leaf, self.dtypes[path]) for path, leaf in self.leaves.items()}
        self._last = threading.local()
        self._check_files()

    def close(self) -> None:
        """Nothing stays open."""

    def _read_manifest(self) -> dict[str, Any]:
        try:
            text = (self.path / MANIFEST).read_text(encoding="utf-8")
            tree = json.loads(text)
            content = tree["content"]
            if tree["crc32"] != zlib.crc32(json.dumps(content).encode()):
                raise ValueError("its contents are not those that were written")
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
            return content
        except OSError as error:
            problem = f"{MANIFEST}: {error.strerror}"
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{MANIFEST}: {error}"
        raise ConversionError(f"{self.path} cannot be read", [problem])

    def _check_files(self) -> None:
        present = {
            file.relative_to(self.path).as_posix(): file.stat().st_size
            for file in self.path.rglob("*")
            if file.is_file() and file.name != MANIFEST
        }
        problems = [f"{name}: missing" for name in sorted(self._files.keys() - present.keys())]
        problems += [f"{name}: no part of it" for name in sorted(present.keys() - self._files.keys())]
        for name in sorted(self._files.keys() & present.keys()):
            size, crc = self._files[name]
            if present[name] != size:
                problems.append(f"{name}: {present[name]} bytes, expected {size}")
            elif "/c/" not in name and zlib.crc32((self.path / name).read_bytes()) != crc:
                problems.append(f"{name}: its contents changed")
        if problems:
            raise ConversionError(f"{self.path} is damaged", problems)

    def read(self, path: LeafPath, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        leaf, dtype, rows = self.leaves[path], self.dtypes[path], self._rows[path]
        if rows is None:
            whole = self._chunk(Chunk(leaf, dtype, None, 0, leaf.block[0]))
            return whole.reshape(*leaf.shape[: leaf.lead], *leaf.block)[lead][start:stop]
        parts = []
        for first in range(start // rows * rows, stop, rows):
            chunk = self._chunk(Chunk(leaf, dtype, lead, first, first + rows))
            parts.append(chunk.reshape(rows, *leaf.block[1:])[max(0, start - first) : stop - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _chunk(self, chunk: Chunk) -> np.ndarray:
        """The verified bytes of a chunk; each thread remembers its last."""
        if getattr(self._last, "name", None) != chunk.name:
            data = np.fromfile(self.path / chunk.name, np.uint8)
            if (len(data), zlib.crc32(data.data)) != self._files[chunk.name]:
                self.verify()
            self._last.name, self._last.data = chunk.name, data.view(chunk.dtype)
        return self._last.data

    def prefetch(self, path: LeafPath, lead: tuple[int, ...]) -> None:
        """Asks the system to read a block of a large leaf soon: its files are too short to be read ahead."""
        leaf, dtype, rows = self.leaves[path], self.dtypes[path], self._rows[path]
        if rows is None or not hasattr(os, "posix_fadvise"):
            return
        for first in range(0, leaf.block[0], rows):
            descriptor = os.open(self.path / Chunk(leaf, dtype, lead, first, first + rows).name, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(descriptor)

    def verify(self) -> None:
        """Reads everything; raises ConversionError with every file whose contents changed."""
        changed = []
        for name, (_, crc) in self._files.items():
            if zlib.crc32((self.path / name).read_bytes()) != crc:
                changed.append(f"{name}: its contents changed")
        raise_if(f"{self.path} is damaged", changed)


def _model(path: Path, tree: dict[str, Any]) -> ModelConfig:
    try:
        return typed({"model": tree, "train": {"seq_len": min(256, tree["max_seq_len"])}}).model
    except (ConfigError, KeyError) as error:
        raise ConversionError(f"{path} cannot be read", [f"{MANIFEST}: {error}"]) from error

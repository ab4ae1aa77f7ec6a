"""Our folder: the parameters alone, as an Orbax checkpoint that is written and resumed a chunk at a time.

    dsv3.json        the model, how the Hugging Face folder looked, and every file with its size and CRC-32;
                     written last
    arrays/          what Orbax reads: `StandardCheckpointer().restore(folder / "arrays")`
      <leaf>/zarr.json, c/...   uncompressed chunks, the axes as Hugging Face has them (a transpose codec)

It grows as `<folder>.partial` beside its final name and is renamed when whole; a journal in it lists the
chunks that are done, and the same command goes on after a kill.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.mapping import Leaf
from dsv3_jax.convert.mapping import Path as LeafPath
from dsv3_jax.convert.safetensors import NAMES
from dsv3_jax.convert.sources import PIECE, Source

MANIFEST, ARRAYS, JOURNAL = "dsv3.json", "arrays", "journal"
EXTRAS = "huggingface"  # The tokenizer and other small files of the release.
FORMAT = 1
WHOLE = 4 << 20  # Leaves up to this size are one chunk.
WORKERS = min(8, 2 * (os.cpu_count() or 1))  # More than cores: they also wait for the disk.
SETTLERS = 2
_ZARR = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F16": "float16", "F32": "float32", "F64": "float64"}

Progress = Callable[[int, int], None]  # Bytes done, bytes in all.


class Chunk(NamedTuple):
    """A file: a run of whole rows in stored order, of one block or, of a small leaf, of all."""

    leaf: Leaf
    dtype: np.dtype
    lead: tuple[int, ...] | None  # None: all blocks.
    start: int
    stop: int

    @property
    def name(self) -> str:
        at = [0] * len(self.leaf.shape)
        if self.lead is not None:
            at[: self.leaf.lead] = self.lead
            at[self.leaf.lead + self.leaf.order[0]] = self.start // (self.stop - self.start)
        return "/".join([ARRAYS, ".".join(self.leaf.path), "c", *map(str, at)])

    @property
    def leads(self) -> list[tuple[int, ...]]:
        if self.lead is not None:
            return [self.lead]
        return list(itertools.product(*(range(size) for size in self.leaf.shape[: self.leaf.lead])))

    @property
    def size(self) -> int:
        """Bytes."""
        rows = len(self.leads) * (self.stop - self.start)
        return rows * math.prod(self.leaf.block[1:]) * self.dtype.itemsize


def chunk_rows(leaf: Leaf, dtype: np.dtype) -> int | None:
    """Rows of a block in a chunk, a divisor of its rows; None: the leaf is one chunk."""
    if math.prod(leaf.shape) * dtype.itemsize <= WHOLE:
        return None
    rows, a_row = leaf.block[0], math.prod(leaf.block[1:]) * dtype.itemsize
    most = max(1, PIECE // a_row)
    return next((rows // n for n in range(-(-rows // most), 8 * rows // most + 2) if rows % n == 0), rows)


def _chunks(leaf: Leaf, dtype: np.dtype) -> Iterator[Chunk]:
    rows = chunk_rows(leaf, dtype)
    if rows is None:
        yield Chunk(leaf, dtype, None, 0, leaf.block[0])
        return
    for lead in itertools.product(*(range(size) for size in leaf.shape[: leaf.lead])):
        for start in range(0, leaf.block[0], rows):
            yield Chunk(leaf, dtype, lead, start, start + rows)


def _zarr_json(leaf: Leaf, dtype: np.dtype) -> dict[str, Any]:
    rows = chunk_rows(leaf, dtype)
    shape = list(leaf.shape)
    if rows is not None:
        shape[: leaf.lead] = [1] * leaf.lead
        shape[leaf.lead + leaf.order[0]] = rows
    order = [*range(leaf.lead), *(leaf.lead + axis for axis in leaf.order)]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(leaf.shape),
        "data_type": _ZARR[NAMES[dtype]],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [
            {"name": "transpose", "configuration": {"order": order}},
            {"name": "bytes", "configuration": {"endian": "little"}},
        ],
        "fill_value": 0.0,
    }


def _orbax_metadata(leaves: dict[LeafPath, Leaf]) -> dict[str, Any]:
    tree = {}
    for path, leaf in leaves.items():
        keys = [{"key": name, "key_type": 2} for name in path]
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape)}
        tree[str(path)] = {"key_metadata": keys, "value_metadata": value}
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def partial(path: Path) -> Path:
    """Where a folder grows until it is whole."""
    return path.with_name(path.name + ".partial")


def check_target(path: Path, size: int) -> None:
    """Raises ConversionError unless a folder of `size` bytes can be written to `path`."""
    problems = []
    if path.exists():
        problems.append("exists already; choose another, or remove it")
    nearest = path.absolute().parent
    while not nearest.exists():
        nearest = nearest.parent
    done = sum(file.stat().st_size for file in partial(path).rglob("*") if file.is_file())
    free = shutil.disk_usage(nearest).free
    if free < size - done:
        problems.append(f"{_bytes(size - done)} are needed, {_bytes(free)} are free")
    if not os.access(nearest, os.W_OK):
        problems.append(f"{nearest} is not writable")
    if problems:
        raise ConversionError(f"{path} cannot be written", problems)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def write(
    source: Source,
    path: Path,
    huggingface: dict[str, Any] | None = None,
    extras: Mapping[str, Path] = MappingProxyType({}),
    progress: Progress | None = None,
) -> None:
    """Writes a source as our folder, or continues to.

    Args:
      source: where the arrays come from.
      path: must not exist; `<path>.partial` is continued if it is there.
      huggingface: what `export` needs to write the folder as it came.
      extras: small files to keep beside the arrays, in the folder `huggingface`, by name.
      progress: called as bytes are written.

    Raises:
      ConversionError: the disk is full, or the target exists.
    """
    chunks = [c for p, leaf in source.leaves.items() for c in _chunks(leaf, source.dtypes[p])]
    total = sum(chunk.size for chunk in chunks)
    check_target(path, total)
    folder = partial(path)
    identity = _identity(source)
    try:
        done = _resume(folder, identity)
        todo = [chunk for chunk in chunks if chunk.name not in done]
        finished = total - sum(chunk.size for chunk in todo)
        with (
            (folder / JOURNAL).open("a", encoding="utf-8") as journal,
            ThreadPoolExecutor(WORKERS) as pool,
            ThreadPoolExecutor(SETTLERS) as settlers,
        ):
            jobs = {pool.submit(_write_chunk, source, folder, chunk): chunk for chunk in todo}
            try:
                for job in as_completed(jobs):
                    chunk, crc = jobs[job], job.result()
                    done[chunk.name] = (chunk.size, crc)
                    journal.write(json.dumps([chunk.name, chunk.size, crc]) + "\n")
                    journal.flush()
                    finished += chunk.size
                    # The disk works while the next chunks are read, and little is left for the end.
                    settlers.submit(_to_disk, folder / chunk.name)
                    if progress:
                        progress(finished, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for name, file in extras.items():
            _keep(name, file, folder, done)
        _finish(source, folder, done, huggingface)
        os.sync()  # The data before the name.
        folder.rename(path)
    except OSError as error:
        why = [f"{error.strerror}; with that mended, the same command continues"]
        raise ConversionError(f"{path} could not be written", why) from error


def _identity(source: Source) -> dict[str, Any]:
    dtypes = {".".join(path): NAMES[dtype] for path, dtype in source.dtypes.items()}
    return json.loads(json.dumps({"model": dataclasses.asdict(source.config), "dtypes": dtypes}))


def _resume(folder: Path, identity: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The chunks of an interrupted conversion that are whole; starts anew if it was of something else."""
    done: dict[str, tuple[int, int]] = {}
    start = folder / "identity.json"
    try:
        same = json.loads(start.read_text(encoding="utf-8")) == identity
        lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines() if same else []
    except (OSError, ValueError):
        same, lines = False, []
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start.write_text(json.dumps(identity), encoding="utf-8")
        return done
    for line in lines:
        try:
            name, size, crc = json.loads(line)
            data = (folder / name).read_bytes()
        except (ValueError, OSError):
            continue
        if len(data) == size and zlib.crc32(data) == crc:
            done[name] = (size, crc)
    return done


def _write_chunk(source: Source, folder: Path, chunk: Chunk) -> int:
    file, crc = folder / chunk.name, 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb", buffering=0) as out:
        for lead in chunk.leads:
            values = np.ascontiguousarray(source.read(chunk.leaf.path, lead, chunk.start, chunk.stop))
            data = values.reshape(-1).view(np.uint8)
            crc = zlib.crc32(data.data, crc)
            written = 0
            while written < len(data):
                written += out.write(data.data[written:])
    return crc


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _finish(
    source: Source, folder: Path, done: dict[str, tuple[int, int]], huggingface: dict[str, Any] | None
):
    for path, leaf in source.leaves.items():
        _write_json(
            folder, f"{ARRAYS}/{'.'.join(path)}/zarr.json", _zarr_json(leaf, source.dtypes[path]), done
        )
    _write_json(folder, f"{ARRAYS}/_METADATA", _orbax_metadata(source.leaves), done)
    _write_json(folder, f"{ARRAYS}/_CHECKPOINT_METADATA", {"custom_metadata": {}}, done)
    (folder / JOURNAL).unlink()
    (folder / "identity.json").unlink()
    content = {"format": FORMAT, **_identity(source), "huggingface": huggingface, "files": done}
    text = json.dumps(content)
    whole = json.dumps({"crc32": zlib.crc32(text.encode()), "content": content})
    (folder / MANIFEST).write_text(whole, encoding="utf-8")


def _keep(name: str, file: Path, folder: Path, done: dict[str, tuple[int, int]]) -> None:
    data = file.read_bytes()
    (folder / EXTRAS).mkdir(exist_ok=True)
    (folder / EXTRAS / name).write_bytes(data)
    done[f"{EXTRAS}/{name}"] = (len(data), zlib.crc32(data))


def _write_json(folder: Path, name: str, tree: dict[str, Any], done: dict[str, tuple[int, int]]) -> None:
    data = json.dumps(tree).encode()
    (folder / name).write_bytes(data)
    done[name] = (len(data), zlib.crc32(data))


def raise_if(title: str, problems: list[str]) -> None:
    """Raises ConversionError if there are problems."""
    if problems:
        raise ConversionError(title, problems)

"""The safetensors format: a JSON header with the dtype, shape and byte range of every tensor, then the bytes.

Read here and not through the `safetensors` package: without torch that package has no E4M3 tensors, and it
stops at the first problem. Nothing is executed on reading, which pickled `.bin` files cannot promise.
"""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # Bytes; the limit of the safetensors package.


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # Bytes from the beginning of the file.
    stop: int


class Header(NamedTuple):
    """A file's tensors by name, in the order of their bytes, and its free-form metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file, checked against the file's size.

    Raises:
      ValueError: with the reason: truncated, not a header, a dtype unknown here, byte ranges that overlap,
        leave holes, do not fit their shapes or do not end where the file ends.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"truncated: {size} bytes, a header begins with 8")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"truncated or not safetensors: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are of this kind.
        raise ValueError(f"the header is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError("the header is not a JSON object")
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    data_start = 8 + length
    entries = {name: _entry(name, fields, data_start) for name, fields in tree.items()}
    _check_ranges(entries, data_start, size)
    return Header(dict(sorted(entries.items(), key=lambda item: item[1][2:])), metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return tree


def _entry(name: str, fields: Any, data_start: int) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has not the fields dtype, shape and data_offsets")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name!r} has the unknown dtype {fields['dtype']!r}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} has the {what} {numbers!r}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r}: the bytes {offsets} do not hold {fields['dtype']}{shape}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_ranges(entries: dict[str, Entry], data_start: int, size: int) -> None:
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"the bytes of {name!r} begin at {entry.start}, expected {end}")
        end = entry.stop
    if end > size:
        raise ValueError(f"truncated: {size} bytes, the tensors end at {end}")
    if end < size:
        raise ValueError(f"{size - end} bytes behind the last tensor")


def layout(tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str]):
    """The bytes before the tensors, and where each will lie, for tensors in this order.

    Returns:
      (header bytes, {name: Entry}).
    """
    tree: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        tree[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # The first tensor is aligned, as the package does it.
    base = 8 + len(text)
    entries = {
        name: Entry(dtype, shape, *(base + offset for offset in tree[name]["data_offsets"]))
        for name, (dtype, shape) in tensors.items()
    }
    return struct.pack("<Q", len(text)) + text, entries


def read_into(file: int, buffer: Any, offset: int) -> None:
    """Fills a writable buffer from an open file descriptor.

    Raises:
      EOFError: the file ends first.
    """
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends {len(view) - done} bytes early")
        done += count


def write_at(file: int, buffer: Any, offset: int) -> None:
    """Writes a whole buffer at an offset of an open file descriptor."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)

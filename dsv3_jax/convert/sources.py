"""Where the arrays of a model come from: all sources answer the same question, some rows of a block."""

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.convert import fp8, mapping
from dsv3_jax.convert.mapping import Leaf
from dsv3_jax.convert.mapping import Path as LeafPath

BF16 = np.dtype(ml_dtypes.bfloat16)
# Rows are read, converted and written in pieces of about so many bytes.
PIECE = 64 << 20


class Source(Protocol):
    """Arrays of a model.

    Attributes:
      config: the model.
      leaves: what there is, by path; with kept E4M3 also the collection `scales`.
      dtypes: of the leaves.
    """

    config: ModelConfig
    leaves: dict[LeafPath, Leaf]
    dtypes: dict[LeafPath, np.dtype]

    def read(self, path: LeafPath, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the block at `lead`, in stored order: [stop - start, *block[1:]]."""
        ...


def rows_of(leaf: Leaf, itemsize: int, limit: int = PIECE, multiple: int = 1) -> int:
    """Rows of a block that make a piece of at most `limit` bytes, if a row is no larger."""
    a_row = max(1, int(np.prod(leaf.block[1:], dtype=np.int64)) * itemsize)
    rows = max(1, limit // a_row)
    return max(multiple, rows // multiple * multiple)


class Files:
    """Open file descriptors by path, closed together; safe to use from several threads."""

    def __init__(self):
        self._open: dict[Path, int] = {}

    def get(self, path: Path) -> int:
        if path not in self._open:
            descriptor = os.open(path, os.O_RDONLY)
            if self._open.setdefault(path, descriptor) != descriptor:
                os.close(descriptor)  # Another thread was first.
        return self._open[path]

    def close(self) -> None:
        for descriptor in self._open.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._open.clear()


class MemorySource:
    """Variables in memory: `{"params": ..., "router": ...}`, numpy or JAX arrays, also sharded ones.

    Raises:
      ValueError: the variables are not those of the model; `args[0]` lists every difference.
    """

    def __init__(self, config: ModelConfig, variables: Any):
        import jax
        from flax.core import meta

        flat, _ = jax.tree_util.tree_flatten_with_path(meta.unbox(dict(variables)))
        arrays = {tuple(str(part.key) for part in path): leaf for path, leaf in flat}
        self.config, self.leaves = config, mapping.leaves(config)
        wanted = {path: leaf.shape for path, leaf in self.leaves.items()}
        found = {path: tuple(array.shape) for path, array in arrays.items()}
        problems = [
            f"{'/'.join(path)}: {found.get(path, 'missing')}, expected {wanted.get(path, 'nothing')}"
            for path in sorted(wanted.keys() | found.keys())
            if wanted.get(path) != found.get(path)
        ]
        if problems:
            raise ValueError(problems)
        self._arrays = arrays
        self.dtypes = {path: np.dtype(arrays[path].dtype) for path in self.leaves}

    def read(self, path: LeafPath, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        leaf = self.leaves[path]
        rows = [slice(None)] * len(leaf.block)
        rows[leaf.order[0]] = slice(start, stop)
        return np.asarray(self._arrays[path][(*lead, *rows)]).transpose(leaf.order)


class RunSource:
    """The parameters in a checkpoint that training wrote, read through TensorStore a piece at a time.

    Args:
      checkpoint: the directory of one step, as `checkpoint.manager` lays it out.
    """

    def __init__(self, config: ModelConfig, checkpoint: Path):
        import orbax.checkpoint as ocp
        import tensorstore as ts

        state = checkpoint / "state"
        self.config, self.leaves = config, mapping.leaves(config)
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(state).item_metadata.tree  # pyright: ignore
        root = ("train",) if "train" in tree else ()
        self._stores, self.dtypes = {}, {}
        for path in self.leaves:
            name = ".".join([*root, *path])
            spec: Any = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{state}", "path": name},
            }
            store = ts.open(spec, read=True).result()
            self._stores[path] = store
            self.dtypes[path] = np.dtype(store.dtype.numpy_dtype)

    def read(self, path: LeafPath, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        leaf = self.leaves[path]
        rows = [slice(None)] * len(leaf.block)
        rows[leaf.order[0]] = slice(start, stop)
        return np.asarray(self._stores[path][(*lead, *rows)].read().result()).transpose(leaf.order)


class Dequantised:
    """A source with kept E4M3 as one without: matrices times their block scales, in `dtype`."""

    def __init__(self, source: Source, dtype: np.dtype = BF16):
        self._source, self.config = source, source.config
        self.leaves = {path: leaf for path, leaf in source.leaves.items() if path[0] != "scales"}
        self.dtypes = {
            path: dtype if source.dtypes[path] == fp8.E4M3 else source.dtypes[path] for path in self.leaves
        }

    def read(self, path: LeafPath, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        values = self._source.read(path, lead, start, stop)
        if values.dtype != fp8.E4M3:
            return values
        leaf = self.leaves[path]
        scale_leaf = mapping.scale_leaf(leaf)
        scales = self._source.read(scale_leaf.path, lead, 0, scale_leaf.block[0])
        return dequantise_rows(values, scales, leaf, start, self.dtypes[path])


def dequantise_rows(
    values: np.ndarray, scales: np.ndarray, leaf: Leaf, start: int, dtype: np.dtype
) -> np.ndarray:
    """Rows of a block from `start` on, times the scales of the whole block, part by part."""
    inner = leaf.matrix[0] // leaf.block[0]  # Rows of the matrix in a row of the block.
    part_rows, part_scales = leaf.matrix[0] // leaf.parts, scales.shape[0] // leaf.parts
    matrix = np.ascontiguousarray(values).reshape(-1, leaf.matrix[1])
    out, row = np.empty(matrix.shape, dtype), start * inner
    done = 0
    while done < len(matrix):
        part, within = divmod(row + done, part_rows)
        count = min(len(matrix) - done, part_rows - within)
        own = scales[part * part_scales : (part + 1) * part_scales]
        out[done : done + count] = fp8.dequantise(matrix[done : done + count], own, dtype, within)
        done += count
    return out.reshape(values.shape)

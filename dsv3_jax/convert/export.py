"""A Hugging Face folder, written from any source a few rows at a time.

It grows as `<folder>.partial` and is renamed when whole. A file of it that was finished before a kill is not
written again.
"""

import concurrent.futures
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.convert import compare, fp8, hf_config, hf_config_write, mapping, native, safetensors
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.hf_folder import DERIVED, INDEX, SCALE, SINGLE
from dsv3_jax.convert.mapping import Layout, Tensor
from dsv3_jax.convert.native_folder import NativeFolder
from dsv3_jax.convert.sources import Dequantised, Source, rows_of

SETTLED = 128 << 20  # Bytes between two requests to write what is in the page cache to the disk.
SHARD = 5_000_000_000  # Bytes of a file, if a tensor is not larger; what transformers and releases use.


class Planned(NamedTuple):
    """A tensor to write.

    Attributes:
      tensor: where its values come from.
      dtype: as written.
      quantise: whether it becomes E4M3 here; its scales are then the tensor behind it.
    """

    tensor: Tensor
    dtype: np.dtype
    shape: tuple[int, ...]
    quantise: bool = False


Plan = dict[str, dict[str, Planned]]  # {file: {name: tensor}}


class Output(NamedTuple):
    """All that a folder will hold."""

    files: Plan
    metadata: dict[str, dict[str, str]]
    config: dict[str, Any]
    extras: list[Path]  # Small files to copy.


def plan(
    source: Source,
    *,
    like: dict[str, Any] | None = None,
    dtype: np.dtype | None = None,
    quantise: bool = False,
    shard: int = SHARD,
    extras: list[Path] | None = None,
) -> Output:
    """What to write.

    Args:
      source: the arrays.
      like: of the folder that they came from (`opened.description`): the same files, names, dtypes and
        configuration, unless `dtype` or `quantise` ask for others.
      dtype: of all tensors but the router bias; None keeps each as it is.
      quantise: linear layers in E4M3 with block scales, as DeepSeek-V3 was released.
      shard: bytes of a file.
      extras: small files that belong to the folder.

    Raises:
      ConversionError: the model has properties that no Hugging Face class expresses.
    """
    changed = dtype is not None or quantise
    if changed and any(path[0] == "scales" for path in source.leaves):
        source = Dequantised(source)
    _check_bias(source)
    layout = Layout(**like["layout"]) if like else Layout()
    tensors = mapping.tensors(source.config, layout)
    planned: dict[str, Planned] = {}
    for name, tensor in tensors.items():
        planned |= _planned(source, name, tensor, dtype, quantise)
    if like and not changed:
        files, metadata = _as_before(planned, like)
    else:
        files = _shards(planned, shard)
        metadata = {file: {"format": "pt"} for file in files}
    kept_fp8 = any(p.dtype == fp8.E4M3 for p in planned.values())
    return Output(files, metadata, _config(source, like, planned, kept_fp8), list(extras or []))


def _planned(source: Source, name: str, tensor: Tensor, dtype, quantise: bool) -> dict[str, Planned]:
    if not tensor.leaf:  # Matrices of no width.
        return {name: Planned(tensor, dtype or np.dtype(np.float32), tensor.shape)}
    leaf, stored = source.leaves[tensor.leaf], source.dtypes[tensor.leaf]
    if tensor.leaf[0] == "router":
        return {name: Planned(tensor, np.dtype(np.float32), tensor.shape)}
    if quantise and is_quantised(tensor):
        scale = Planned(tensor, np.dtype(np.float32), fp8.scale_shape(tensor.shape))
        return {name: Planned(tensor, fp8.E4M3, tensor.shape, True), name + SCALE: scale}
    found = {name: Planned(tensor, dtype or stored, tensor.shape)}
    if stored == fp8.E4M3 and dtype is None:
        scales = mapping.scale_leaf(leaf)
        rows = scales.block[0] // leaf.parts
        part = tensor.start // (leaf.block[0] // leaf.parts)
        of_scales = Tensor(fp8.scale_shape(tensor.shape), scales.path, tensor.lead, part * rows, rows)
        found[name + SCALE] = Planned(of_scales, np.dtype(np.float32), of_scales.shape)
    return found


# What DeepSeek-V3 keeps in E4M3: all linear layers but the router, the head and `eh_proj`.
_QUANTISED = {"w_dq", "w_uq_qr", "w_dkv_kr", "w_uk_uv", "w_q", "w_k", "w_v", "w_o", "gate_up", "down"}


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor is one of those that DeepSeek-V3 keeps in E4M3."""
    return tensor.leaf[-1:] != () and tensor.leaf[-1] in _QUANTISED and len(tensor.shape) == 2


def _check_bias(source: Source) -> None:
    """A bias that steers the router and that the folder cannot hold would be lost in silence."""
    if mapping.has_bias(source.config):
        return
    problems = []
    for path, leaf in source.leaves.items():
        if path[0] != "router":
            continue
        for lead in itertools.product(*(range(size) for size in leaf.shape[: leaf.lead])):
            if np.any(source.read(path, lead, 0, leaf.block[0])):
                problems.append(f"{'/'.join(path)}: is not zero, and this class of models has no router bias")
                break
    native.raise_if("The model cannot be written for Hugging Face", problems)


def _as_before(planned: dict[str, Planned], like: dict[str, Any]):
    """The files as they were; what the source no longer has (scales multiplied out) is left out."""
    files: Plan = {}
    for file, entry in like["files"].items():
        files[file] = {}
        for name, dtype in entry["tensors"]:
            if name not in planned or DERIVED.fullmatch(name):
                continue
            before, now = np.dtype(dtype), planned[name]
            keep = before == fp8.E4M3 and now.dtype != fp8.E4M3
            files[file][name] = now if keep else now._replace(dtype=before)
    files = {file: tensors for file, tensors in files.items() if tensors}
    return files, {file: like["files"][file]["metadata"] for file in files}


def _shards(planned: dict[str, Planned], limit: int) -> Plan:
    groups: list[dict[str, Planned]] = [{}]
    size = 0
    for name, tensor in planned.items():
        bytes_ = math.prod(tensor.shape) * tensor.dtype.itemsize
        if groups[-1] and size + bytes_ > limit and not name.endswith(SCALE):
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += bytes_
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _config(source: Source, like: dict[str, Any] | None, planned: dict[str, Planned], quantised: bool):
    before = like["config"] if like else {}
    kinds = [p.dtype for p in planned.values() if p.dtype != fp8.E4M3 and p.tensor.leaf[:1] == ("params",)]
    name = str(max(kinds, key=kinds.count)) if kinds else "bfloat16"
    if before and compare.same_model(hf_config.from_hf(before).config, source.config):
        tree = dict(before)
    else:
        try:
            new = hf_config_write.to_hf(source.config, fp8=quantised, dtype=name)
        except ValueError as error:
            raise ConversionError("The model cannot be written for Hugging Face", error.args[0]) from None
        tree = {field: value for field, value in before.items() if field in hf_config.UNUSED} | new
    had = "quantization_config" in tree
    if had and not quantised:
        del tree["quantization_config"]
    elif quantised and not had:
        tree |= {"quantization_config": hf_config_write.to_hf(source.config, fp8=True)["quantization_config"]}
    return tree


def write(source: Source, path: Path, output: Output, progress: native.Progress | None = None) -> None:
    """Writes the folder, or continues to.

    Raises:
      ConversionError: the disk is full, or the target exists.
    """
    headers = {
        file: safetensors.layout({n: (p.dtype, p.shape) for n, p in tensors.items()}, output.metadata[file])
        for file, tensors in output.files.items()
    }
    sizes = {file: _size(start, entries) for file, (start, entries) in headers.items()}
    total = sum(sizes.values())
    native.check_target(path, total)
    folder = native.partial(path)
    if any(p.quantise for tensors in output.files.values() for p in tensors.values()) and any(
        leaf[0] == "scales" for leaf in source.leaves
    ):
        source = Dequantised(source)
    try:
        done = _resume(folder, {file: start.hex() for file, (start, _) in headers.items()}, sizes)
        finished = sum(sizes[file] for file in done)
        with (
            concurrent.futures.ThreadPoolExecutor(native.WORKERS) as pool,
            concurrent.futures.ThreadPoolExecutor(1) as settler,
        ):
            settling = []
            for file, tensors in output.files.items():
                if file in done:
                    continue
                descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                waiting = 0
                try:
                    for count in _write_file(pool, source, descriptor, tensors, *headers[file]):
                        finished, waiting = finished + count, waiting + count
                        if waiting >= SETTLED:  # The disk works while the rest of the file is written.
                            settling.append(settler.submit(os.fdatasync, descriptor))
                            waiting = 0
                        if progress:
                            progress(finished, total)
                except BaseException:
                    settler.shutdown(cancel_futures=True)
                    os.close(descriptor)
                    raise
                settling.append(settler.submit(_settle, descriptor, folder / native.JOURNAL, file))
            for job in settling:
                job.result()
        _finish(folder, output)
        os.sync()  # The data before the name.
        folder.rename(path)
    except OSError as error:
        why = [f"{error.strerror}; with that mended, the same command continues"]
        raise ConversionError(f"{path} could not be written", why) from error


def _size(start: bytes, entries: dict[str, safetensors.Entry]) -> int:
    return max([len(start), *(entry.stop for entry in entries.values())])


def _resume(folder: Path, identity: dict[str, str], sizes: dict[str, int]) -> list[str]:
    """The files of an interrupted export that are whole; starts anew if it was of something else."""
    start = folder / "identity.json"
    try:
        if json.loads(start.read_text(encoding="utf-8")) == identity:
            names = (folder / native.JOURNAL).read_text(encoding="utf-8").splitlines()
            return [n for n in names if n in sizes and (folder / n).stat().st_size == sizes[n]]
    except (OSError, ValueError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start.write_text(json.dumps(identity), encoding="utf-8")
    return []


def _settle(descriptor: int, journal: Path, file: str) -> None:
    """Closes a file when it is on the disk, and notes that it is whole."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with journal.open("a", encoding="utf-8") as out:
        out.write(file + "\n")


def _write_file(
    pool, source: Source, file: int, tensors: dict[str, Planned], start: bytes, entries
) -> Iterator[int]:
    """Writes a file, its tensors at the same time; yields the bytes written as they are."""
    safetensors.write_at(file, start, 0)
    # One job reads what lies together, as gate and up do in our folder.
    groups: dict[tuple, list[tuple]] = {}
    for name, planned in tensors.items():
        if name.endswith(SCALE) and tensors.get(name.removesuffix(SCALE), planned).quantise:
            continue  # Written with its tensor.
        together = groups.setdefault((planned.tensor.leaf, planned.tensor.lead), [])
        together.append((planned, entries[name], entries.get(name + SCALE)))
    places = list(groups)
    jobs = [
        pool.submit(_write_group, source, file, group, places[i + native.WORKERS : i + native.WORKERS + 1])
        for i, group in enumerate(groups.values())
    ]
    try:
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()
    except BaseException:
        for job in jobs:
            job.cancel()
        concurrent.futures.wait(jobs)
        raise


def _write_group(source: Source, file: int, group: list[tuple], soon: list[tuple]) -> int:
    """Writes some tensors, when it has announced those that are read later."""
    for path, lead in soon:
        if path and isinstance(source, NativeFolder) and len(lead) == source.leaves[path].lead:
            source.prefetch(path, lead)
    return sum(_write_tensor(source, file, *item) for item in group)


def _write_tensor(source: Source, file: int, planned: Planned, entry: safetensors.Entry, scales) -> int:
    tensor = planned.tensor
    if not tensor.leaf or 0 in planned.shape:
        return 0
    leaf, offset = source.leaves[tensor.leaf], entry.start
    kind = source.dtypes[tensor.leaf]
    inner = leaf.matrix[0] // leaf.block[0] if len(leaf.block) > 1 else 1
    aligned = fp8.BLOCK // math.gcd(inner, fp8.BLOCK) if planned.quantise else 1
    rows = rows_of(
        leaf, max(kind.itemsize, planned.dtype.itemsize) * (3 if planned.quantise else 1), multiple=aligned
    )
    found_scales = []
    for lead, first, last in _blocks(tensor, leaf):
        for begin in range(first, last, rows):
            values = source.read(tensor.leaf, lead, begin, min(begin + rows, last))
            if planned.quantise:
                values, scale = fp8.quantise(np.ascontiguousarray(values).reshape(-1, leaf.matrix[1]))
                found_scales.append(scale)
            data = np.ascontiguousarray(values.astype(planned.dtype, copy=False)).reshape(-1).view(np.uint8)
            safetensors.write_at(file, data, offset)
            offset += len(data)
    if planned.quantise:
        safetensors.write_at(file, np.concatenate(found_scales).reshape(-1).view(np.uint8), scales.start)
    return entry.stop - entry.start


def _blocks(tensor: Tensor, leaf: mapping.Leaf) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(lead, first row, last row) of the blocks that a tensor covers."""
    if len(tensor.lead) == leaf.lead:
        yield tensor.lead, tensor.start, tensor.start + tensor.rows
        return
    for expert in range(tensor.rows):
        yield (*tensor.lead, expert), 0, leaf.block[0]


def _finish(folder: Path, output: Output) -> None:
    if list(output.files) != [SINGLE]:
        where = {name: file for file, tensors in output.files.items() for name in tensors}
        size = sum(
            math.prod(p.shape) * p.dtype.itemsize
            for tensors in output.files.values()
            for p in tensors.values()
        )
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for extra in output.extras:
        shutil.copyfile(extra, folder / extra.name)
    (folder / native.JOURNAL).unlink(missing_ok=True)
    (folder / "identity.json").unlink()
    # Last: without it no library takes the folder for a model.
    (folder / "config.json").write_text(json.dumps(output.config, indent=2) + "\n", encoding="utf-8")

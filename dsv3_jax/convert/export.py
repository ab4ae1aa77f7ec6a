"""A Hugging Face folder, written from any source a few rows at a time.

It grows as `<folder>.partial` and is renamed when whole. A file of it that was finished before a kill is not
written again.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from dsv3_jax.convert import fp8, mapping, native, safetensors
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.export_plan import Output, Planned
from dsv3_jax.convert.hf_files import INDEX, SINGLE
from dsv3_jax.convert.hf_folder import SCALE
from dsv3_jax.convert.mapping import Tensor
from dsv3_jax.convert.native_folder import NativeFolder
from dsv3_jax.convert.sources import Dequantised, Source, rows_of

SETTLED = 128 << 20  # Bytes between two requests to write what is in the page cache to the disk.


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
        todo = {file: tensors for file, tensors in output.files.items() if file not in done}
        for count in _write_files(source, folder, todo, headers):
            finished += count
            if progress:
                progress(finished, total)
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


class _Growing:
    """A file under way."""

    def __init__(self, path: Path, start: bytes, jobs: int):
        self.path, self.jobs, self.unsettled = path, jobs, 0
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        safetensors.write_at(self.descriptor, start, 0)

    def settle(self) -> None:
        """Closes it when it is on the disk, and notes that it is whole."""
        try:
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)
        with (self.path.parent / native.JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(self.path.name + "\n")


def _write_files(source: Source, folder: Path, files: dict, headers: dict) -> Iterator[int]:
    """Writes the files one behind the other, without a pause between them; yields the bytes written."""
    groups = {file: _groups(tensors, headers[file][1]) for file, tensors in files.items()}
    places = [place for of_file in groups.values() for place in of_file]
    running: dict[Future, _Growing] = {}
    settling: list[Future] = []
    submitted = 0
    with ThreadPoolExecutor(native.WORKERS) as pool, ThreadPoolExecutor(1) as settler:
        try:
            for file, of_file in groups.items():
                growing = _Growing(folder / file, headers[file][0], len(of_file))
                for group in of_file.values():
                    submitted += 1
                    soon = places[submitted + native.WORKERS - 1 : submitted + native.WORKERS]
                    job = pool.submit(_write_group, source, growing.descriptor, group, soon)
                    running[job] = growing
                # The next file is begun when there is no job of this one left for an idle thread.
                enough = native.WORKERS if submitted < len(places) else 0
                while len(running) > enough:
                    for job in wait(running, return_when=FIRST_COMPLETED).done:
                        count = job.result()
                        settling += _settle_some(settler, running.pop(job), count)
                        yield count
        except BaseException:
            settler.shutdown(cancel_futures=True)
            for job in running:
                job.cancel()
            wait(running)
            for descriptor in {growing.descriptor for growing in running.values()}:
                os.close(descriptor)
            raise
        for job in settling:
            job.result()


def _settle_some(settler: ThreadPoolExecutor, file: _Growing, count: int) -> list[Future]:
    """Asks for what was written to go to the disk, which so works while the rest is written."""
    file.jobs, file.unsettled = file.jobs - 1, file.unsettled + count
    if not file.jobs:
        return [settler.submit(file.settle)]
    if file.unsettled < SETTLED:
        return []
    file.unsettled = 0
    return [settler.submit(os.fdatasync, file.descriptor)]


def _groups(tensors: dict[str, Planned], entries: dict[str, safetensors.Entry]) -> dict[tuple, list[tuple]]:
    """A file's tensors, with those together that one job reads: what lies together, as gate and up do."""
    groups: dict[tuple, list[tuple]] = {}
    for name, planned in tensors.items():
        if name.endswith(SCALE) and tensors.get(name.removesuffix(SCALE), planned).quantise:
            continue  # Written with its tensor.
        together = groups.setdefault((planned.tensor.leaf, planned.tensor.lead), [])
        together.append((planned, entries[name], entries.get(name + SCALE)))
    return groups


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
    for name, file in output.extras.items():
        shutil.copyfile(file, folder / name)
    (folder / native.JOURNAL).unlink(missing_ok=True)
    (folder / "identity.json").unlink()
    # Last: without it no library takes the folder for a model.
    (folder / "config.json").write_text(json.dumps(output.config, indent=2) + "\n", encoding="utf-8")

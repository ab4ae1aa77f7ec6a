"""What an export will write: which tensors, in which files, dtypes and order, and the config.json."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.convert import compare, fp8, hf_config, hf_config_write, mapping, native
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.hf_files import SINGLE
from dsv3_jax.convert.hf_folder import DERIVED, SCALE
from dsv3_jax.convert.mapping import Layout, Tensor
from dsv3_jax.convert.sources import Dequantised, Source

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
    extras: Mapping[str, Path]  # Small files to copy, by name.


def plan(
    source: Source,
    *,
    like: dict[str, Any] | None = None,
    dtype: np.dtype | None = None,
    quantise: bool = False,
    shard: int = SHARD,
    extras: Mapping[str, Path] | None = None,
) -> Output:
    """What to write.

    Args:
      source: the arrays.
      like: of the folder that they came from (`opened.description`): the same files, names, dtypes and
        configuration, unless `dtype` or `quantise` ask for others. Of a training run it has the
        configuration alone.
      dtype: of all tensors but the router bias; None keeps each as it is.
      quantise: linear layers in E4M3 with block scales, as DeepSeek-V3 was released.
      shard: bytes of a file.
      extras: small files that belong to the folder, by name.

    Raises:
      ConversionError: the model has properties that no Hugging Face class expresses.
    """
    same_files = like is not None and "files" in like and dtype is None and not quantise
    if (dtype is not None or quantise) and any(path[0] == "scales" for path in source.leaves):
        source = Dequantised(source)
    _check_bias(source)
    layout = Layout(**like["layout"]) if like and "layout" in like else Layout()
    tensors = mapping.tensors(source.config, layout)
    planned: dict[str, Planned] = {}
    for name, tensor in tensors.items():
        planned |= _planned(source, name, tensor, dtype, quantise)
    if like and same_files:
        files, metadata = _as_before(planned, like)
    else:
        files = _shards(planned, shard)
        metadata = {file: {"format": "pt"} for file in files}
    before = like["config"] if like else {}
    return Output(files, metadata, _config(source, before, planned, same_files), extras or {})


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


def _config(source: Source, before: dict[str, Any], planned: dict[str, Planned], same_dtypes: bool):
    quantised = any(p.dtype == fp8.E4M3 for p in planned.values())
    kinds = [p.dtype for p in planned.values() if p.dtype != fp8.E4M3 and p.tensor.leaf[:1] == ("params",)]
    name = str(max(kinds, key=kinds.count)) if kinds else "bfloat16"
    if before and compare.same_model(hf_config.from_hf(before).config, source.config):
        tree = dict(before)
        if not same_dtypes:
            fields = [field for field in ("dtype", "torch_dtype") if field in tree] or ["torch_dtype"]
            tree |= dict.fromkeys(fields, name)
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

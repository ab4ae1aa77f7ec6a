"""A Hugging Face folder as a source: refused unless its tensors are those of the model of its config.json."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from dsv3_jax.config import MTPConfig
from dsv3_jax.convert import fp8, hf_config, mapping, safetensors
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.hf_files import HFFiles
from dsv3_jax.convert.mapping import Layout, Leaf, Tensor
from dsv3_jax.convert.mapping import Path as LeafPath
from dsv3_jax.convert.sources import BF16, PIECE, Files, dequantise_rows

SCALE = "_scale_inv"  # Behind the name of a tensor in E4M3.
FLOATS = ("F32", "F16", "BF16", "F8_E4M3")
# Buffers that old versions of transformers saved; they follow from the configuration.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


class HFFolder:
    """A checked folder, and a source of arrays.

    Args:
      path: the folder.
      keep_fp8: E4M3 matrices stay as they are, their scales in the collection `scales`; otherwise they are
        multiplied out to bfloat16, as DeepSeek's own conversion does.

    Attributes:
      hf_config: config.json as it is.
      files: the tensors of each file, in order: {file: {name: Entry}}.
      metadata: the free-form metadata of each file.
      notes: what was found, is unknown or contradicts something, and was not used; one line each.
      unused: fields of config.json that have no part in the logits.

    Raises:
      ConversionError: the folder is damaged, contradicts itself or is not supported; with every problem.
    """

    def __init__(self, path: str | Path, keep_fp8: bool = False):
        self.path = Path(path)
        found = HFFiles(self.path)
        self.hf_config, self.files, self.metadata = found.config, found.headers, found.metadata
        self.notes, self._problems = found.notes, found.problems
        self._descriptors = Files()
        if found.imported is not None and self.files:
            self._match(found.imported)
        self._raise()
        self.unused = found.imported.unused if found.imported else []
        self._verify_copies()
        self._raise()
        self._make_leaves(keep_fp8)

    def _raise(self) -> None:
        if self._problems:
            self._descriptors.close()
            raise ConversionError(f"{self.path} cannot be read as a Hugging Face folder", self._problems)

    def close(self) -> None:
        """Closes the files."""
        self._descriptors.close()

    # ------------------------------------------------------------- whether it is the model it says

    def _match(self, imported: hf_config.Imported) -> None:
        self.entries: dict[str, tuple[str, safetensors.Entry]] = {}
        for file, entries in self.files.items():
            for name, entry in entries.items():
                if name in self.entries:
                    self._problems.append(f"{name}: in {self.entries[name][0]} and in {file}")
                self.entries[name] = (file, entry)
        config, names = imported.config, self.entries.keys()
        layers = {int(match[1]) for name in names if (match := LAYER.match(name))}
        if config.mtp.depth and not any(layer >= config.n_layers for layer in layers):
            # transformers drops these layers on loading, and saves a configuration that still counts them.
            self.notes.append(
                f"config.json: {config.mtp.depth} prediction layers, but the folder has none: left out"
            )
            config = dataclasses.replace(config, mtp=MTPConfig(depth=0))
        self.config = config
        depth = f"model.layers.{config.n_layers}."
        copies = any(name.startswith(depth) and ".embed_tokens." in name for name in names)
        heads = any(name.startswith(depth) and ".shared_head.head." in name for name in names)
        self.layout = Layout(
            fused=any(".experts.gate_up_proj" in name for name in names),
            mtp_copies=copies or heads,
            tied_head=config.tie_embeddings and "lm_head.weight" in names,
        )
        wanted = mapping.tensors(config, self.layout)
        self.tensors: dict[str, Tensor] = {}
        scales: set[str] = set()
        for name, tensor in wanted.items():
            if name not in self.entries:
                if 0 not in tensor.shape:  # Matrices of no width may as well be absent.
                    self._problems.append(f"{name}: missing, expected {list(tensor.shape)}")
                continue
            entry = self.entries[name][1]
            self.tensors[name] = tensor
            kind = safetensors.NAMES[entry.dtype]
            if entry.shape != tensor.shape:
                self._problems.append(
                    f"{name}: {list(entry.shape)}, config.json makes it {list(tensor.shape)}"
                )
            elif kind not in FLOATS:
                self._problems.append(f"{name}: {kind}, expected one of {', '.join(FLOATS)}")
            elif kind == "F8_E4M3":
                scales |= self._check_scale(name, entry)
        self._check_halves()
        self._problems += [
            f"{name}: {list(self.entries[name][1].shape)} is no part of this model"
            for name in names
            if name not in wanted and name not in scales and not DERIVED.fullmatch(name)
        ]
        self.notes += [
            f"{name}: follows from the configuration, not read" for name in names if DERIVED.fullmatch(name)
        ]
        if imported.fp8 and not scales and not self._problems:
            self._problems.append("config.json: quantization_config says fp8, but no tensor is: remove it")
        if scales and not imported.fp8:
            self._problems.append("config.json: tensors are E4M3, but there is no quantization_config")

    def _check_halves(self) -> None:
        """No release mixes the two 16-bit kinds: a few of the one among the other are mislabelled."""
        of_kind: dict[str, list[str]] = {"F16": [], "BF16": []}
        for name in self.tensors:
            of_kind.get(safetensors.NAMES[self.entries[name][1].dtype], []).append(name)
        few, many = sorted(of_kind, key=lambda kind: len(of_kind[kind]))
        self._problems += [
            f"{name}: {few}, where {len(of_kind[many])} others are {many}" for name in of_kind[few]
        ]

    def _check_scale(self, name: str, entry: safetensors.Entry) -> set[str]:
        if len(entry.shape) != 2:
            self._problems.append(
                f"{name}: E4M3 with {len(entry.shape)} axes; block scales belong to matrices"
            )
            return set()
        scale, shape = name + SCALE, fp8.scale_shape(entry.shape)
        if scale not in self.entries:
            self._problems.append(f"{scale}: missing, but {name} is E4M3")
        else:
            found = self.entries[scale][1]
            if found.shape != shape or found.dtype != np.float32:
                kind = safetensors.NAMES[found.dtype]
                self._problems.append(f"{scale}: {kind}{list(found.shape)}, expected F32{list(shape)}")
        return {scale}

    def _verify_copies(self) -> None:
        """Repeated tensors must repeat: the model has one of each."""
        for name, tensor in self.tensors.items():
            if not tensor.copy_of:
                continue
            (file, entry), (other_file, other) = self.entries[name], self.entries[tensor.copy_of]
            same = entry.dtype == other.dtype
            for offset in range(0, (entry.stop - entry.start) if same else 0, PIECE):
                size = min(PIECE, entry.stop - entry.start - offset)
                pair = [np.empty(size, np.uint8), np.empty(size, np.uint8)]
                for buffer, at, start in ((pair[0], file, entry.start), (pair[1], other_file, other.start)):
                    safetensors.read_into(self._descriptors.get(self.path / at), buffer, start + offset)
                same = same and np.array_equal(pair[0], pair[1])
            if not same:
                self._problems.append(
                    f"{name}: differs from {tensor.copy_of}, which the model shares with it"
                )

    # ----------------------------------------------------------------------------- the arrays in it

    def _make_leaves(self, keep_fp8: bool) -> None:
        self.leaves: dict[LeafPath, Leaf] = {}
        self.dtypes: dict[LeafPath, np.dtype] = {}
        self._blocks: dict[LeafPath, dict[tuple[int, ...], list[tuple[int, str, Tensor]]]] = {}
        kinds: dict[LeafPath, set[np.dtype]] = {}
        for name, tensor in self.tensors.items():
            if tensor.copy_of or not tensor.leaf:
                continue
            self._blocks.setdefault(tensor.leaf, {}).setdefault(tensor.lead, []).append(
                (tensor.start, name, tensor)
            )
            kinds.setdefault(tensor.leaf, set()).add(self.entries[name][1].dtype)
        for path, leaf in mapping.leaves(self.config).items():
            self.leaves[path] = leaf
            if path not in kinds:  # A router bias that the release does not have.
                self.dtypes[path] = np.dtype(np.float32)
            elif kinds[path] == {fp8.E4M3} and keep_fp8:
                self.dtypes[path] = fp8.E4M3
                scales = mapping.scale_leaf(leaf)
                self.leaves[scales.path], self.dtypes[scales.path] = scales, np.dtype(np.float32)
            else:
                wide = {BF16 if kind == fp8.E4M3 else kind for kind in kinds[path]}
                self.dtypes[path] = wide.pop() if len(wide) == 1 else np.dtype(np.float32)
        self._of_scales = {
            mapping.scale_leaf(leaf).path: path for path, leaf in mapping.leaves(self.config).items()
        }

    def read(self, path: LeafPath, lead: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        leaf, dtype = self.leaves[path], self.dtypes[path]
        out = np.empty((stop - start, *leaf.block[1:]), dtype)
        if path[0] == "scales":
            self._read_scales(self._of_scales[path], lead, start, out)
            return out
        if path not in self._blocks:
            out[:] = 0
            return out
        for first, name, tensor in self._tensors_of(path, lead):
            rows = leaf.block[0] // leaf.parts if leaf.parts > 1 and tensor.lead == lead else leaf.block[0]
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                skip = low - first
                if tensor.lead != lead:  # A tensor of all experts: this one's rows begin behind the others'.
                    skip += lead[-1] * leaf.block[0]
                self._read_rows(name, leaf, skip, out[low - start : high - start])
        return out

    def _tensors_of(self, path: LeafPath, lead: tuple[int, ...]) -> list[tuple[int, str, Tensor]]:
        blocks = self._blocks[path]
        return blocks[lead] if lead in blocks else blocks[lead[:-1]]

    def _read_rows(self, name: str, leaf: Leaf, skip: int, out: np.ndarray) -> None:
        """Fills `out` with rows of a tensor, converted to its dtype."""
        file, entry = self.entries[name]
        rows = out if entry.dtype == out.dtype else np.empty(out.shape, entry.dtype)
        a_row = rows[:1].nbytes
        buffer = rows.reshape(-1).view(np.uint8)
        safetensors.read_into(self._descriptors.get(self.path / file), buffer, entry.start + skip * a_row)
        if entry.dtype == fp8.E4M3 and out.dtype != fp8.E4M3:
            scales = self._scales(name)
            one = leaf._replace(shape=self._part_shape(leaf), parts=1)
            out[:] = dequantise_rows(rows, scales, one, skip, BF16).astype(out.dtype, copy=False)
        elif rows is not out:
            out[:] = rows.astype(out.dtype)

    def _part_shape(self, leaf: Leaf) -> tuple[int, ...]:
        """The shape of a leaf that one of its parts alone would make."""
        shape = list(leaf.shape)
        shape[leaf.lead + leaf.order[0]] //= leaf.parts
        return tuple(shape)

    def _scales(self, name: str) -> np.ndarray:
        file, entry = self.entries[name + SCALE]
        scales = np.empty(entry.shape, np.float32)
        safetensors.read_into(
            self._descriptors.get(self.path / file), scales.reshape(-1).view(np.uint8), entry.start
        )
        return scales

    def _read_scales(self, path: LeafPath, lead: tuple[int, ...], start: int, out: np.ndarray) -> None:
        parts = [self._scales(name) for _, name, _ in sorted(self._tensors_of(path, lead))]
        out[:] = np.concatenate(parts)[start : start + len(out)]

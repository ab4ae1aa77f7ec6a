"""The files of a Hugging Face folder: config.json, the index, and the headers of the safetensors files."""

import json
import re
from pathlib import Path
from typing import Any

from dsv3_jax.convert import hf_config, safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFFiles:
    """What the files of a folder say; nothing of a tensor is read, and nothing is raised.

    Attributes:
      config: config.json as it is; empty if it cannot be read.
      imported: what it means; None if it means no model.
      headers: the tensors of each file, in order: {file: {name: Entry}}.
      metadata: the free-form metadata of each file.
      problems: what is wrong, one line each.
      notes: what was found and was not used.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        self.imported: hf_config.Imported | None = None
        self.headers: dict[str, dict[str, safetensors.Entry]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        if not path.is_dir():
            self.problems.append("no such directory")
            return
        self._read_config()
        self._read_files()

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            tree = json.loads((self.path / name).read_text(encoding="utf-8"))
            if isinstance(tree, dict):
                return tree
            self.problems.append(f"{name}: not a JSON object")
        except OSError as error:
            self.problems.append(f"{name}: {error.strerror}")
        except ValueError as error:
            self.problems.append(f"{name}: not JSON: {error}")
        return None

    def _read_config(self) -> None:
        self.config = self._json("config.json") or {}
        if not self.config:
            return
        try:
            self.imported = hf_config.from_hf(self.config)
        except ValueError as error:
            self.problems += [f"config.json: {problem}" for problem in error.args[0]]
        else:
            self.notes += self.imported.notes

    def _read_files(self) -> None:
        here = sorted(p.name for p in self.path.iterdir() if p.name.endswith(".safetensors"))
        pickled = sorted(p.name for p in self.path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        weight_map = None
        if (self.path / INDEX).exists():
            weight_map = self._read_index()
            if weight_map is None:
                return
            files = sorted(set(weight_map.values()))
            self.problems += [f"{INDEX}: {name} is not listed" for name in here if _is_shard(name, files)]
            self.notes += [
                f"{name}: not in the index, not read"
                for name in set(here) - set(files)
                if not _is_shard(name, files)
            ]
        elif (self.path / SINGLE).exists():
            files = [SINGLE]
            self.problems += [f"{name}: there is no {INDEX} that lists it" for name in here if name != SINGLE]
        else:
            files = []
            why = f"no {INDEX} and no {SINGLE}"
            if pickled:
                why += (
                    f"; {pickled[0]} is a pickle, which runs code when it is read: convert it to safetensors"
                )
            self.problems.append(why)
        for name in files:
            self._read_file(name)
        if weight_map is not None:
            self._compare_index(weight_map)

    def _read_index(self) -> dict[str, str] | None:
        tree = self._json(INDEX)
        if tree is None:
            return None
        weight_map = tree.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self.problems.append(f"{INDEX}: no weight_map")
            return None
        outside = [
            f"{INDEX}: {name} is in {file!r}, which is no safetensors file of this folder"
            for name, file in weight_map.items()
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors")
        ]
        self.problems += outside
        metadata = tree.get("metadata")
        self._total = metadata.get("total_size") if isinstance(metadata, dict) else None
        return None if outside else weight_map

    def _read_file(self, name: str) -> None:
        try:
            header = safetensors.read_header(self.path / name)
        except OSError as error:
            self.problems.append(f"{name}: {error.strerror}")
        except ValueError as error:
            self.problems.append(f"{name}: {error}")
        else:
            self.headers[name], self.metadata[name] = header.entries, header.metadata

    def _compare_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if file in self.headers and name not in self.headers[file]:
                self.problems.append(f"{INDEX}: {name} is not in {file}")
        for file, entries in self.headers.items():
            for name in entries:
                if weight_map.get(name) != file:
                    says = weight_map.get(name, "nowhere")
                    self.problems.append(f"{INDEX}: {name} is in {file}, the index says {says}")
        size = sum(e.stop - e.start for entries in self.headers.values() for e in entries.values())
        if self._total is not None and self._total != size:
            self.notes.append(f"{INDEX}: total_size = {self._total!r}, the tensors have {size} bytes")


def _is_shard(name: str, listed: list[str]) -> bool:
    """Whether a file that the index does not list looks like one that it should."""
    return name not in listed and bool(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))


def extras(folder: Path) -> dict[str, Path]:
    """The small files of a release besides weights and configuration, by name: tokenizer, code, licence."""
    kinds = (".json", ".txt", ".model", ".jinja", ".md", ".py")
    return {
        file.name: file
        for file in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if (file.suffix in kinds or file.name == "LICENSE")
        and file.name not in ("config.json", INDEX)
        and file.is_file()
        and file.stat().st_size <= 1 << 28
    }

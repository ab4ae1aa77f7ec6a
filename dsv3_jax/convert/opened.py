"""Any folder that holds a model: of Hugging Face, ours, or a training run's checkpoint."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.config_checks import typed
from dsv3_jax.config_reading import ConfigError
from dsv3_jax.convert import native
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.convert.hf_files import extras
from dsv3_jax.convert.hf_folder import HFFolder
from dsv3_jax.convert.native_folder import NativeFolder
from dsv3_jax.convert.sources import Dequantised, RunSource, Source

TOKENIZER = re.compile(r"tokenizer|special_tokens_map\.json|added_tokens\.json|chat_template|vocab|merges")


class Opened:
    """A folder that was recognised.

    Attributes:
      kind: "huggingface", "dsv3" or "run".
      source: its arrays, E4M3 kept where asked for.
      huggingface: how the Hugging Face folder looked that it came from, if it did; of a training run that
        started from one, its configuration.
      extras: the small files that belong to the model, by name.
      notes: what was found, is unknown or contradicts something, and was not used.
      unused: fields of config.json that have no part in the logits.
    """

    def __init__(
        self, kind: str, source: Any, huggingface: dict[str, Any] | None, extras: Mapping[str, Path]
    ):
        self.kind, self.source, self.huggingface, self.extras = kind, source, huggingface, extras
        self.notes: list[str] = getattr(source, "notes", [])
        self.unused: list[str] = getattr(source, "unused", [])

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.source.config

    def log_notes(self, log: logging.Logger) -> None:
        """Reports all that was not used."""
        for note in self.notes:
            log.warning("%s", note)
        if self.unused:
            log.info("config.json: without a part in the logits: %s", ", ".join(self.unused))

    def dequantised(self) -> Source:
        """The arrays, without E4M3."""
        kept = any(path[0] == "scales" for path in self.source.leaves)
        return Dequantised(self.source) if kept else self.source


@contextlib.contextmanager
def open_source(path: str | Path, keep_fp8: bool = False, quick: bool = False) -> Iterator[Opened]:
    """Opens a folder, whatever it is.

    Args:
      path: a Hugging Face folder, a folder of `dsv3 import`, one step's checkpoint of a training run, or the
        run's work directory (its last step).
      keep_fp8: see `hf_folder.HFFolder`.
      quick: of a training run, the contents of small files alone are verified.

    Raises:
      ConversionError: it is none of them, or damaged.
    """
    path = Path(path).absolute()  # TensorStore and Orbax take no others.
    if (path / native.MANIFEST).exists():
        folder = NativeFolder(path)
        yield Opened("dsv3", folder, folder.huggingface, extras(path / native.EXTRAS))
    elif step := _checkpoint(path):
        config = _run_config(step, quick)
        yield Opened("run", RunSource(config.model, step), *_origin(config))
    else:
        folder = HFFolder(path, keep_fp8)
        try:
            yield Opened("huggingface", folder, description(folder), extras(path))
        finally:
            folder.close()


def description(folder: HFFolder) -> dict[str, Any]:
    """What `export` needs to write a folder again as it was."""
    files = {
        file: {"metadata": folder.metadata[file], "tensors": [[n, str(e.dtype)] for n, e in entries.items()]}
        for file, entries in folder.files.items()
    }
    return {"config": folder.hf_config, "layout": folder.layout._asdict(), "files": files}


def _checkpoint(path: Path) -> Path | None:
    """The directory of the last step, if `path` is a training run's."""
    if (path / "state").is_dir() and (path / "config").is_dir():
        return path
    for parent in (path, path / "checkpoints"):
        steps = [p for p in parent.glob("*") if p.name.isdigit() and (p / "state").is_dir()]
        if steps:
            return max(steps, key=lambda p: int(p.name))
    return None


def _run_config(step: Path, quick: bool) -> Config:
    from dsv3_jax.checkpoint import integrity  # Here: it needs JAX, and released weights do not.

    problems = integrity.problems(step, quick)
    if problems:
        raise ConversionError(f"{step} is damaged", problems)
    try:
        return typed(json.loads((step / "config" / "metadata").read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise ConversionError(f"{step} cannot be read", [str(error)]) from error


def _origin(config: Config) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """(configuration, small files) of the release that a run was trained from, if it is still there.

    The tokenizer is that of the run, which may have more tokens.
    """
    tree, small = None, {}
    if config.train.init_from:
        with (
            contextlib.suppress(ConversionError),
            open_source(config.train.init_from, quick=True) as origin,
        ):
            small = dict(origin.extras)
            if origin.huggingface:
                tree = {"config": origin.huggingface["config"]}
    file = Path(config.data.tokenizer).expanduser()
    if file.is_file():
        small |= {name: path for name, path in extras(file.parent).items() if TOKENIZER.match(name)}
        small["tokenizer.json"] = file
    return tree, small

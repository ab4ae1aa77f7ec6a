"""A folder to a model that speaks: of a training run, ours, or of Hugging Face."""

import json
from pathlib import Path
from typing import Any

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.data.tokenizers import Tokenizer, load_tokenizer
from dsv3_jax.generation.sampling import RequestError
from dsv3_jax.pretrained import load_pretrained


def load(
    path: str | Path, *, tokenizer: str = "", dtype: Any = None
) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    """(config, variables, tokenizer) of a folder.

    Args:
      path: a work directory of train.py, a checkpoint of one, a folder of `dsv3 import`, or of Hugging Face.
      tokenizer: "byte", or the path of a tokenizer.json; "" is the one of the training run, or the
        tokenizer.json in the folder.
      dtype: of the parameters; None keeps the stored ones.

    Raises:
      ConversionError: the folder cannot be read.
      DataError: the tokenizer cannot.
      RequestError: there is no tokenizer, and none is named.
    """
    folder = Path(path)
    spec = tokenizer or tokenizer_of(folder)
    if not spec:
        raise RequestError(f"{folder} has no tokenizer.json: name one with --tokenizer (a path, or 'byte')")
    found = load_tokenizer(spec)
    config, variables = load_pretrained(folder, dtype=dtype)
    return config, variables, found


def tokenizer_of(folder: Path) -> str:
    """The tokenizer that belongs to a folder, as `load_tokenizer` takes it; "" if there is none."""
    if (folder / "tokenizer.json").is_file():
        return str(folder / "tokenizer.json")
    # A work directory, or one of its checkpoints: the run's configuration names it.
    for file in (folder / "config" / "metadata", folder / "config.json"):
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(tree, dict) and isinstance(tree.get("data"), dict):
            return tree["data"].get("tokenizer", DataConfig.tokenizer)
    return ""

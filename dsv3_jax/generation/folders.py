"""A folder to a model that speaks: of a training run, ours, or of Hugging Face."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.convert.native import EXTRAS
from dsv3_jax.data.tokenizers import Tokenizer, load_tokenizer
from dsv3_jax.generation.sampling import RequestError
from dsv3_jax.pretrained import load_pretrained


class Loaded(NamedTuple):
    """A model and what speaks for it."""

    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer
    tokenizer_file: Path | None  # The tokenizer.json, None for bytes.
    prefix: tuple[int, ...]  # Tokens that start every text: the model was trained so.


def load(path: str | Path, *, tokenizer: str = "", dtype: Any = None) -> Loaded:
    """The model of a folder.

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
    file = None if spec == "byte" else Path(spec)
    return Loaded(config, variables, found, file, () if file is None else _prefix(file))


def tokenizer_settings(file: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer.json; empty if there is none."""
    try:
        settings = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def special_token(settings: dict[str, Any], name: str) -> str | None:
    """The text of a token that a tokenizer_config.json names, `bos_token` for one."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _prefix(file: Path) -> tuple[int, ...]:
    settings = tokenizer_settings(file)
    name = special_token(settings, "bos_token")
    if not settings.get("add_bos_token") or name is None:
        return ()
    from tokenizers import Tokenizer as Backend

    number = Backend.from_file(str(file)).token_to_id(name)
    return () if number is None else (number,)


def tokenizer_of(folder: Path) -> str:
    """The tokenizer that belongs to a folder, as `load_tokenizer` takes it; "" if there is none."""
    for file in (folder / "tokenizer.json", folder / EXTRAS / "tokenizer.json"):  # Hugging Face's, and ours.
        if file.is_file():
            return str(file)
    # A work directory, or one of its checkpoints: the run's configuration names it.
    for file in (folder / "config" / "metadata", folder / "config.json"):
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(tree, dict) and isinstance(tree.get("data"), dict):
            return tree["data"].get("tokenizer", DataConfig.tokenizer)
    return ""

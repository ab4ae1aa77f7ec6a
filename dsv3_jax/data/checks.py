"""Everything about the data that can be found wrong before any compute."""

import os
from pathlib import Path

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import cache_root
from dsv3_jax.data.errors import DataError, Problem
from dsv3_jax.data.sources import open_source
from dsv3_jax.data.tokenizers import load_tokenizer


def check(config: DataConfig, vocab_size: int, seq_len: int) -> list[Problem]:
    """All problems of `config` with a model of `vocab_size` trained on `seq_len`, as (field, value, fix).

    Opens files and looks at their first records; reads and tokenises nothing more. Whether a split is long
    enough for one sequence shows only when a `Loader` is made.
    """
    found: list[Problem] = []
    if not 0.0 < config.validation_fraction < 1.0:
        found.append(("data.validation_fraction", config.validation_fraction, "must be between 0 and 1"))
    if not 0.0 <= config.fim_rate <= 1.0:
        found.append(("data.fim_rate", config.fim_rate, "must be in [0, 1]"))
    if config.read_threads < 0:
        found.append(("data.read_threads", config.read_threads, "must be 0 (no reading ahead) or more"))
    if seq_len < 1:
        found.append(("train.seq_len", seq_len, "must be 1 or more"))
    found += _check_cache(config)
    found += _check_tokenizer(config, vocab_size)
    try:
        found += open_source(config).problems()
    except DataError as error:
        found.append(error.problem)
    return found


def _check_tokenizer(config: DataConfig, vocab_size: int) -> list[Problem]:
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except DataError as error:
        return [error.problem]
    found: list[Problem] = []
    if tokenizer.vocab_size > vocab_size:
        fix = f"the tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} ids; use that many or more"
        found.append(("model.vocab_size", vocab_size, fix))
    if config.fim_rate > 0 and tokenizer.fim_ids is None:
        found.append(("data.fim_rate", config.fim_rate, "the tokenizer has no FIM tokens; use 0"))
    return found


def _check_cache(config: DataConfig) -> list[Problem]:
    folder: Path = cache_root(config.cache_dir)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return []
    return [("data.cache_dir", config.cache_dir, f"{folder} can't be written; give a folder that can")]

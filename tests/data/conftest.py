"""Small corpora for the data tests."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_jax.config import DataConfig


@pytest.fixture
def make_config(tmp_path) -> Callable[..., DataConfig]:
    """A DataConfig over .txt files with the given texts, with its own cache."""

    def make(texts: list[str], **fields) -> DataConfig:
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for number, text in enumerate(texts):
            (folder / f"{number:04d}.txt").write_text(text, "utf-8")
        fields = {"validation_fraction": 0.2, **fields}
        return DataConfig(source=f"files:{folder}/*.txt", cache_dir=str(tmp_path / "cache"), **fields)

    return make


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[..., str]:
    """Saves a byte-level BPE tokenizer, trained on a sentence, with the given special tokens."""
    return _save_tokenizer


def _save_tokenizer(path, special):
    """A byte-level BPE tokenizer, trained on a sentence."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["def hello(world): return world"] * 5, trainer)
    backend.save(str(path))
    return str(path)

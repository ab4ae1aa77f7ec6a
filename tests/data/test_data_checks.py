"""Problems of the data section: all found at once, none raised."""

import dataclasses

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data import check


def test_defaults_are_fine(tmp_path):
    assert check(DataConfig(cache_dir=str(tmp_path)), 512, 256) == []


def test_all_problems_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    config = DataConfig(
        source="files:/nowhere/*.txt",
        tokenizer="/nowhere/tokenizer.json",
        cache_dir=f"{tmp_path}/file/cache",
        validation_fraction=0.0,
        fim_rate=1.5,
        read_threads=-1,
    )
    found = check(config, 512, 0)
    assert {field: value for field, value, _ in found} == {
        "data.source": "files:/nowhere/*.txt",
        "data.tokenizer": "/nowhere/tokenizer.json",
        "data.cache_dir": f"{tmp_path}/file/cache",
        "data.validation_fraction": 0.0,
        "data.fim_rate": 1.5,
        "data.read_threads": -1,
        "train.seq_len": 0,
    }
    assert len(found) == 7 and all(fix for *_, fix in found)


@pytest.mark.parametrize(
    ("fields", "vocab_size", "expected"),
    [
        ({"validation_fraction": 1.0}, 512, ["data.validation_fraction"]),
        ({"validation_fraction": float("nan")}, 512, ["data.validation_fraction"]),
        ({"fim_rate": -0.1}, 512, ["data.fim_rate"]),
        ({"source": "nonsense"}, 512, ["data.source"]),
        ({"source": "tfds:nowhere"}, 512, ["data.source"]),
        ({}, 260, ["model.vocab_size"]),
        ({}, 261, []),
    ],
)
def test_each_problem(tmp_path, fields, vocab_size, expected):
    config = dataclasses.replace(DataConfig(cache_dir=str(tmp_path), data_dir=str(tmp_path)), **fields)
    assert [field for field, *_ in check(config, vocab_size, 64)] == expected


def test_json_tokenizer(tmp_path, save_tokenizer):
    path = save_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    config = DataConfig(cache_dir=str(tmp_path), tokenizer=path)
    assert check(config, 300, 64) == []
    ((field, value, fix),) = check(config, 200, 64)
    assert (field, value) == ("model.vocab_size", 200) and path in fix
    ((field, value, fix),) = check(dataclasses.replace(config, fim_rate=0.1), 300, 64)
    assert (field, value, fix) == ("data.fim_rate", 0.1, "the tokenizer has no FIM tokens; use 0")

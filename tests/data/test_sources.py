"""The three kinds of source, each against documents known from elsewhere."""

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.sources import open_source

TEXTS = ["one", "zwei\nand a second line", "трое 🙂", ""]


@pytest.fixture(scope="module")
def stdlib_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("stdlib")


def test_stdlib_is_this_pythons_own_source(stdlib_cache):
    documents = list(open_source(DataConfig(cache_dir=str(stdlib_cache))).documents())
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name, _ in documents]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or "test" in name.split("/")[:-1] for name in names)
    assert sum(len(text) for _, text in documents) > 8e6
    for name, text in documents[::25]:
        assert text == (folder / name).read_text("utf-8")
        ast.parse(text)


def test_stdlib_is_prepared_by_two_processes_at_once(stdlib_cache, tmp_path):
    code = (
        "import sys, hashlib\n"
        "from dsv3_jax.config import DataConfig\n"
        "from dsv3_jax.data.sources import open_source\n"
        "documents = list(open_source(DataConfig(cache_dir=sys.argv[1])).documents())\n"
        "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
        "print(hashlib.sha256(repr(documents).encode()).hexdigest())\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1 and len(outputs.pop()) == 65


def test_damaged_stdlib_is_made_again(stdlib_cache, caplog):
    source = open_source(DataConfig(cache_dir=str(stdlib_cache)))
    before = list(source.documents())
    (record,) = stdlib_cache.rglob("*.array_record-*")
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 0xFF
    record.write_bytes(content)
    assert list(source.documents()) == before
    assert "is made again" in caplog.text


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A tiny TFDS dataset in ArrayRecord, with two configs and a split that is not "train"."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=n, description=n) for n in ("a", "b")]

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"body": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train" if self.builder_config.name == "a" else "other": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"body": text, "n": i}) for i, text in enumerate(TEXTS))

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("tmp")))  # TFDS leaves folders there.
    for config in ("a", "b"):
        builder = Tiny(data_dir=folder, config=config, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    monkeypatch.undo()
    return str(folder)


def _tfds(tfds_dir, name, field="body"):
    return open_source(DataConfig(source=f"tfds:{name}", data_dir=tfds_dir, text_field=field))


@pytest.mark.parametrize("name", ["tiny/a", "tiny/a:1.2.0"])
def test_tfds_by_name(tfds_dir, name):
    source = _tfds(tfds_dir, name)
    assert source.problems() == []
    assert list(source.documents()) == [(f"{name}[{i}]", text) for i, text in enumerate(TEXTS)]
    assert source.identity() == _tfds(tfds_dir, name).identity()


@pytest.mark.parametrize(
    ("name", "field", "wrong", "fix"),
    [
        ("nowhere", "body", "data.source", "not prepared in"),
        ("tiny/c", "body", "data.source", "not prepared in"),
        ("tiny/a:9.0.0", "body", "data.source", "not prepared in"),
        ("not a name!", "body", "data.source", "not prepared in"),
        ("tiny/b", "body", "data.source", "no \"train\" split, only ['other']"),
        ("tiny/a", "text", "data.text_field", "which has ['body', 'n']"),
        ("tiny/a", "n", "data.text_field", "no such field of text"),
    ],
)
def test_tfds_problems(tfds_dir, name, field, wrong, fix):
    ((found, value, text),) = _tfds(tfds_dir, name, field).problems()
    assert (found, value) == (wrong, field if wrong == "data.text_field" else f"tfds:{name}")
    assert fix in text


def test_tfds_without_random_access(tfds_dir, tmp_path):
    prepared = tmp_path / "tiny" / "a" / "1.2.0"
    shutil.copytree(Path(tfds_dir) / "tiny" / "a" / "1.2.0", prepared)
    info = prepared / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    ((field, value, fix),) = _tfds(str(tmp_path), "tiny/a").problems()
    assert (field, value) == ("data.source", "tfds:tiny/a")
    assert fix == "not in a format with random access; prepare it with array_record"


def _write(folder, kind):
    rows = [{"text": text, "other": 1} for text in TEXTS]
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text, "utf-8")
        return [str(folder / f"{i}.txt") for i in range(len(TEXTS))]
    if kind == "jsonl":
        (folder / "x.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", "utf-8")
        return [f"{folder}/x.jsonl:{2 * i + 1}" for i in range(len(TEXTS))]  # Line numbers.
    parquet.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=3)
    return [f"{folder}/x.parquet:{i + 1}" for i in range(len(TEXTS))]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_files(tmp_path, kind):
    names = _write(tmp_path, kind)
    source = open_source(DataConfig(source=f"files:{tmp_path}/*.{kind}"))
    assert source.problems() == []
    assert list(source.documents()) == list(zip(names, TEXTS, strict=True))


def test_files_of_all_kinds_in_folders(tmp_path):
    names = []
    for kind in ("jsonl", "parquet", "txt"):
        (tmp_path / kind).mkdir()
        names += _write(tmp_path / kind, kind)
    source = open_source(DataConfig(source=f"files:{tmp_path}/**"))
    assert list(source.documents()) == list(zip(names, TEXTS * 3, strict=True))


def test_identity_follows_the_files(tmp_path):
    _write(tmp_path, "txt")
    source = open_source(DataConfig(source=f"files:{tmp_path}/*"))
    before = source.identity()
    assert source.identity() == before
    (tmp_path / "0.txt").write_text("once")
    changed = source.identity()
    (tmp_path / "9.txt").write_text("more")
    assert len({json.dumps(i) for i in (before, changed, source.identity())}) == 3


def test_text_that_is_not_utf8_is_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert [text for _, text in open_source(DataConfig(source=f"files:{tmp_path}/*")).documents()] == [
        "caf\ufffd"
    ]


@pytest.mark.parametrize(
    ("name", "content", "wrong", "fix"),
    [
        (None, b"", "data.source", "no file matches"),
        ("a.csv", b"", "data.source", "a.csv has an unknown extension; use .txt, .jsonl, .parquet"),
        ("a.jsonl", b"{", "data.source", "a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "data.text_field", "a.jsonl:1 has ['body']"),
        ("a.jsonl", b'{"text": 3}', "data.text_field", "a.jsonl:1 holds none there"),
        ("a.jsonl", b"[1]", "data.text_field", "a.jsonl:1 holds none there"),
        ("a.parquet", b"PAR1?", "data.source", "a.parquet is not Parquet"),
    ],
)
def test_file_problems(tmp_path, name, content, wrong, fix):
    if name:
        (tmp_path / name).write_bytes(content)
    ((found, _, text),) = open_source(DataConfig(source=f"files:{tmp_path}/*")).problems()
    assert found == wrong
    assert fix in text


@pytest.mark.parametrize("column", [{"body": ["x"]}, {"text": [3]}])
def test_parquet_without_the_text_column(tmp_path, column):
    parquet.write_table(pa.table(column), tmp_path / "a.parquet")
    ((found, value, text),) = open_source(DataConfig(source=f"files:{tmp_path}/*")).problems()
    assert (found, value) == ("data.text_field", "text")
    assert text.endswith(f"a.parquet has {list(column)}")


def test_bad_line_far_down_names_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n{"txt": "z"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:3 has \['txt'\]"):
        list(open_source(DataConfig(source=f"files:{tmp_path}/*")).documents())


@pytest.mark.parametrize("source", ["", "c4", "tfds:", "files:", "python_stdlib:x"])
def test_unknown_kind(source):
    with pytest.raises(DataError, match=r'^data.source = .*: use "python_stdlib", "tfds:NAME'):
        open_source(DataConfig(source=source))

"""Where documents come from: the embedded corpus, a prepared TFDS dataset, or local files.

A source yields (name, text) in a fixed order. Its `identity` is found without reading the documents,
so that a start with a warm cache imports neither TFDS nor PyArrow for the embedded corpus.
"""

import glob
import hashlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import cache_root, ensure_folder
from dsv3_jax.data.errors import DataError, Problem

_READ_BATCH = 256  # Records or rows fetched at once.


class Source(Protocol):
    """A fixed sequence of documents.

    `location` names its place in the cache: what is there may become stale, which `identity` tells.
    """

    location: str

    def identity(self) -> dict[str, Any]:
        """JSON-able; as long as it stays equal, so do the documents."""
        ...

    def documents(self) -> Iterator[tuple[str, str]]:
        """(name, text) of every document, in order."""
        ...

    def problems(self) -> list[Problem]:
        """What can be found wrong without reading the documents."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that `config.source` names. Raises DataError on a kind that doesn't exist."""
    kind, _, rest = config.source.partition(":")
    if config.source == "python_stdlib":
        return StdlibSource(config)
    if kind == "tfds" and rest:
        return TfdsSource(config, rest)
    if kind == "files" and rest:
        return FilesSource(config, rest)
    raise DataError(
        "data.source", config.source, 'use "python_stdlib", "tfds:NAME[/CONFIG][:VERSION]" or "files:GLOB"'
    )


class StdlibSource:
    """The Python standard library, through the TFDS builder in `stdlib_builder`."""

    def __init__(self, config: DataConfig):
        self._version = ".".join(map(str, sys.version_info[:3]))
        self.location = f"python_stdlib {self._version}"
        self._folder = cache_root(config.cache_dir) / "tfds" / "python_stdlib" / self._version

    def identity(self) -> dict[str, Any]:
        return {"kind": "python_stdlib", "python": self._version}

    def documents(self) -> Iterator[tuple[str, str]]:
        from dsv3_jax.data import stdlib_builder

        ensure_folder(self._folder, stdlib_builder.prepare, self._fault)
        for example in _examples(_open_tfds(self._folder).as_data_source("train")):
            yield example["path"].decode(), example["text"].decode()

    def _fault(self, folder: Path) -> str | None:
        try:
            for _ in _examples(_open_tfds(folder).as_data_source("train")):
                pass
        except Exception as error:  # Whatever TFDS and ArrayRecord raise on damaged files.
            return f"it can't be read ({error})"
        return None

    def problems(self) -> list[Problem]:
        folder = Path(sysconfig.get_paths()["stdlib"])
        if next(folder.glob("*.py"), None) is None:
            return [("data.source", "python_stdlib", f"this Python has no source files in {folder}")]
        return []


class TfdsSource:
    """The "train" split of a dataset that TFDS has prepared with random access."""

    def __init__(self, config: DataConfig, name: str):
        self._config, self._name = config, name
        self.location = f"{config.source} {config.data_dir} {config.text_field}"

    def _builder(self) -> Any:
        from tensorflow_datasets.core import read_only_builder

        data_dir = os.path.expanduser(self._config.data_dir) or None
        try:
            return read_only_builder.builder_from_files(self._name, data_dir=data_dir)
        except Exception as error:  # Not found, a name that doesn't parse, found twice, unreadable.
            where = data_dir or "TFDS's default folder"
            reason = str(error).strip().split("\n")[0]
            raise self._error(
                f"not prepared in {where} ({reason}); prepare it with"
                " `tfds build --file_format=array_record`, or set data.data_dir"
            ) from error

    def _data(self) -> Any:
        builder = self._builder()
        if "train" not in builder.info.splits:
            raise self._error(f'it has no "train" split, only {sorted(builder.info.splits)}')
        try:
            return builder.as_data_source("train")
        except (NotImplementedError, ValueError) as error:
            raise self._error("not in a format with random access; prepare it with array_record") from error

    def _error(self, fix: str) -> DataError:
        return DataError("data.source", self._config.source, fix)

    def identity(self) -> dict[str, Any]:
        folder = Path(self._builder().data_path)
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir()]
        return {"kind": "tfds", "folder": str(folder), "files": _digest(sorted(stats))}

    def documents(self) -> Iterator[tuple[str, str]]:
        examples = _examples(self._data())
        for number in itertools.count():
            try:
                example = next(examples)
            except StopIteration:
                return
            except Exception as error:  # Whatever ArrayRecord and TFDS raise on damaged files.
                raise self._error(f"example {number} can't be read ({error})") from error
            yield f"{self._name}[{number}]", self._text(example)

    def _text(self, example: Any) -> str:
        field = self._config.text_field
        value = example.get(field) if isinstance(example, dict) else None
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, str):
            return value
        names = sorted(example) if isinstance(example, dict) else type(example).__name__
        raise DataError(
            "data.text_field", field, f"no such field of text in {self._config.source}, which has {names}"
        )

    def problems(self) -> list[Problem]:
        try:
            if next(self.documents(), None) is None:
                raise self._error("its train split is empty")
        except DataError as error:
            return [error.problem]
        return []


class FilesSource:
    """Local files: a .txt is a document; so is each line of a .jsonl and each row of a .parquet."""

    def __init__(self, config: DataConfig, pattern: str):
        self._config = config
        self._pattern = os.path.expanduser(pattern)
        self.location = f"{os.path.abspath(self._pattern)} {config.text_field}"
        self._readers = {".txt": self._read_txt, ".jsonl": self._read_jsonl, ".parquet": self._read_parquet}

    def _files(self) -> list[Path]:
        return sorted(Path(p) for p in glob.glob(self._pattern, recursive=True) if os.path.isfile(p))

    def identity(self) -> dict[str, Any]:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self._files()]
        return {"kind": "files", "files": _digest(stats), "text_field": self._config.text_field}

    def documents(self) -> Iterator[tuple[str, str]]:
        for file in self._files():
            yield from self._readers[file.suffix](file)

    def _read_txt(self, file: Path) -> Iterator[tuple[str, str]]:
        yield str(file), file.read_text("utf-8", errors="replace")

    def _read_jsonl(self, file: Path) -> Iterator[tuple[str, str]]:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        fix = f"{file}:{number} is not JSON ({error})"
                        raise DataError("data.source", self._config.source, fix) from error
                    yield f"{file}:{number}", self._text(row, f"{file}:{number}")

    def _read_parquet(self, file: Path) -> Iterator[tuple[str, str]]:
        import pyarrow.parquet as parquet

        self._check_parquet(file)
        number = 0
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(_READ_BATCH, columns=[self._config.text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", self._text(row, f"row {number} of {file}")

    def _text(self, row: Any, where: str) -> str:
        field = self._config.text_field
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            has = f"has {sorted(row)}" if isinstance(row, dict) and field not in row else "holds none there"
            raise DataError("data.text_field", field, f"must be a field of text; {where} {has}")
        return value

    def problems(self) -> list[Problem]:
        files = self._files()
        if not files:
            return [("data.source", self._config.source, "no file matches")]
        found = []
        for file in files:
            try:
                self._check_file(file)
            except DataError as error:
                found.append(error.problem)
        return found

    def _check_file(self, file: Path) -> None:
        if file.suffix not in self._readers:
            fix = f"{file} has an unknown extension; use {', '.join(self._readers)}"
            raise DataError("data.source", self._config.source, fix)
        try:
            if file.suffix == ".parquet":
                self._check_parquet(file)
            elif file.suffix == ".jsonl":
                next(self._read_jsonl(file), None)
            else:
                file.open("rb").close()
        except OSError as error:
            raise DataError("data.source", self._config.source, f"{file} can't be read ({error})") from error

    def _check_parquet(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            schema = parquet.read_schema(file)
        except pa.ArrowException as error:
            raise DataError("data.source", self._config.source, f"{file} is not Parquet ({error})") from error
        field = self._config.text_field
        kind = schema.field(field).type if field in schema.names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError("data.text_field", field, f"must be a string column; {file} has {schema.names}")


def _open_tfds(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder)


def _examples(data: Any) -> Iterator[Any]:
    for first in range(0, len(data), _READ_BATCH):
        yield from data.__getitems__(range(first, min(first + _READ_BATCH, len(data))))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

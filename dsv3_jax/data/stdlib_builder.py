"""The embedded corpus: the Python standard library's own source, as a TFDS dataset.

Twelve megabytes of real text that every machine with Python already has: nothing to download. It is
written as ArrayRecord, which TFDS writes and reads without TensorFlow.
"""

import contextlib
import io
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

# Test folders are missing from many distributions of Python; without them the corpus is nearly the same
# everywhere. The rest are third-party packages, and files that describe how this Python was compiled.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would look for this dataset on the network, and leave a temporary folder behind."""


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """One example a source file: `path` in the library, and `text`. The version is Python's own."""

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return _LocalInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"path": text, "text": text}),
            disable_shuffling=True,  # Examples stay in order of path.
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for number, (path, text) in enumerate(stdlib_files(stdlib_folder())):
            yield number, {"path": path, "text": text}


def stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(folder: Path) -> Iterator[tuple[str, str]]:
    """(path under `folder`, text) of the library's source files, in order of path."""
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not any(p.startswith(_SKIPPED_PREFIXES) for p in parts):
            with contextlib.suppress(UnicodeDecodeError):
                yield "/".join(parts), path.read_text("utf-8")


def prepare(folder: Path) -> None:
    """Writes the dataset's files into `folder`, quietly."""
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with tempfile.TemporaryDirectory(dir=folder) as work:  # TFDS makes name/version/ and downloads/ in it.
        builder = PythonStdlib(data_dir=work, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ...", which it doesn't.
            builder.download_and_prepare(download_config=config)
        for file in Path(builder.data_dir).iterdir():
            file.rename(folder / file.name)

"""Whether the files of a checkpoint are those that were written.

A digest file in the checkpoint's directory lists every file with its size and SHA-256. It is written
before the rename that commits the checkpoint, so a committed checkpoint without one is damaged.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIGEST_FILE = "digest.json"
# Orbax writes these between the digest and the commit. They hold no state.
UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")
# Files up to this size are read by a quick check too.
SMALL = 1 << 16
# Hashing releases the interpreter's lock; more threads than this wait for the disk.
THREADS = 8


def write_digest(directory: str | Path) -> None:
    """Writes the digest file of `directory`, atomically, from the files that it holds now."""
    directory = Path(directory)
    names = [name for name in _files(directory) if name not in (*UNLISTED, DIGEST_FILE)]
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(lambda name: _sha256(directory / name), names))
    entries = {
        name: {"size": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, hashes, strict=True)
    }
    temporary = directory / (DIGEST_FILE + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / DIGEST_FILE)


def problems(directory: str | Path, quick: bool = False) -> list[str]:
    """What is wrong with a committed checkpoint, one line a file that names it; empty if it is sound.

    Every file must be there, no other may be, and sizes and contents must be those of the digest. A
    `quick` check reads the contents of small files only.
    """
    directory = Path(directory)
    try:
        entries = json.loads((directory / DIGEST_FILE).read_text(encoding="utf-8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return [f"{DIGEST_FILE}: missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{DIGEST_FILE}: unreadable ({error})"]

    present = set(_files(directory))
    listed = set(expected)
    found = [f"{name}: missing" for name in sorted((listed | set(UNLISTED)) - present)]
    found += [f"{name}: not part of it" for name in sorted(present - listed - {DIGEST_FILE, *UNLISTED})]
    found += _metadata_problems(directory, present)

    def check(name: str) -> str | None:
        size, sha256 = expected[name]
        try:
            actual = (directory / name).stat().st_size
            if actual != size:
                return f"{name}: {actual} bytes, expected {size}"
            if not (quick and size > SMALL) and _sha256(directory / name) != sha256:
                return f"{name}: contents changed (SHA-256 differs)"
        except OSError as error:
            return f"{name}: unreadable ({error.strerror})"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found += [problem for problem in pool.map(check, sorted(listed & present)) if problem]
    return found


def _metadata_problems(directory: Path, present: set[str]) -> list[str]:
    name = UNLISTED[0]
    if name not in present:
        return []
    try:
        if isinstance(json.loads((directory / name).read_text(encoding="utf-8")), dict):
            return []
    except (OSError, ValueError):
        pass
    return [f"{name}: not a JSON object"]


def _files(directory: Path) -> list[str]:
    """Paths of all files under `directory`, relative to it, with forward slashes."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Folders that are either whole or absent, whoever makes them and whenever they are killed.

A folder is written beside its final place and renamed, so that a process killed half-way leaves no
half-made folder that looks finished. A lock keeps several processes from doing the same work; it
only saves time: where the file system has no locks, the first rename wins.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv3_jax.data.errors import DataError

log = logging.getLogger(__name__)


def cache_root(cache_dir: str) -> Path:
    """The folder for everything that can be made again: `cache_dir`, or ~/.cache/dsv3_jax when empty."""
    return Path(cache_dir or "~/.cache/dsv3_jax").expanduser()


def ensure_folder(target: Path, build: Callable[[Path], None], fault: Callable[[Path], str | None]) -> None:
    """Makes `target` with `build(folder)` unless it is there and `fault(target)` finds nothing wrong.

    Args:
      target: the final place. Its parents are made.
      build: fills an empty folder. What it raises is passed on, and nothing is left behind.
      fault: what is wrong with an existing folder, or None. It must not raise on damaged content.

    Raises:
      DataError: the cache can't be written.
    """
    if target.exists() and fault(target) is None:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError("data.cache_dir", str(target.parent), f"can't be written ({error})") from error
    with _lock(target) as locked:
        if target.exists():
            reason = fault(target)
            if reason is None:
                return  # Another process made it while this one waited.
            log.warning("%s is made again: %s", target, reason)
        if locked:  # Nobody else works on this target, so these were left by killed processes.
            for stale in target.parent.glob(f"{target.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
        _build_and_rename(target, build, fault)


def _build_and_rename(
    target: Path, build: Callable[[Path], None], fault: Callable[[Path], str | None]
) -> None:
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir(parents=True)
        build(new)
        try:
            new.rename(target)
        except OSError:  # There is one: damaged, or just made by another process.
            if fault(target) is not None:
                target.rename(old)
                new.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Holds the lock of `target`; yields False where the file system has none. Death releases it."""
    try:
        file = open(target.with_name(f".{target.name}.lock"), "w")
    except OSError as error:
        raise DataError("data.cache_dir", str(target.parent), f"can't be written ({error})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked

"""Folders in the cache: whole or absent, with several processes, damage, and SIGKILL."""

import signal
import subprocess
import sys
import time

import pytest

from dsv3_jax.data.cache import cache_root, ensure_folder
from dsv3_jax.data.errors import DataError

# Writes two files slowly, says so half-way, and counts how often it ran.
_BUILDER = """
import sys, time
from pathlib import Path
from dsv3_jax.data.cache import ensure_folder

def build(folder):
    (folder / "a").write_text("1")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "b").write_text("2")

def fault(folder):
    return None if (folder / "b").exists() else "b is missing"

ensure_folder(Path(sys.argv[1]), build, fault)
print("done", flush=True)
"""


def _start(target, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", _BUILDER, str(target), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def _fault(folder):
    return None if (folder / "b").exists() else "b is missing"


def _build(folder):
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")


def test_two_processes_build_once(tmp_path):
    processes = [_start(tmp_path / "x" / "y", 0.5) for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(outputs) == ["done\n", "half\ndone\n"]
    assert sorted(f.name for f in (tmp_path / "x" / "y").iterdir()) == ["a", "b"]


def test_killed_half_way_leaves_nothing_that_looks_finished(tmp_path):
    target = tmp_path / "y"
    process = _start(target, 60)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    start = time.monotonic()
    ensure_folder(target, _build, _fault)
    assert time.monotonic() - start < 5  # The dead process's lock doesn't hold.
    assert sorted(f.name for f in tmp_path.iterdir()) == [".y.lock", "y"]  # What it left was removed.


def test_damage_is_reported_and_repaired(tmp_path, caplog):
    target = tmp_path / "y"
    ensure_folder(target, _build, _fault)
    ensure_folder(target, pytest.fail, _fault)  # Whole: not built again.
    (target / "b").unlink()
    ensure_folder(target, _build, _fault)
    assert (target / "b").read_text() == "2"
    assert f"{target} is made again: b is missing" in caplog.text


def test_failing_build_leaves_the_old_state(tmp_path):
    def build(folder):
        (folder / "a").write_text("1")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        ensure_folder(tmp_path / "y", build, _fault)
    assert [f.name for f in tmp_path.iterdir()] == [".y.lock"]


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("not supported")

    def build(folder):  # Another process finishes first.
        _build(folder)
        (tmp_path / "y").mkdir()
        (tmp_path / "y" / "b").write_text("theirs")

    monkeypatch.setattr("fcntl.flock", no_locks)
    ensure_folder(tmp_path / "y", build, _fault)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".y.lock", "y"]
    assert (tmp_path / "y" / "b").read_text() == "theirs"


def test_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^data.cache_dir = .* can't be written"):
        ensure_folder(tmp_path / "file" / "y", _build, _fault)


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root("") == tmp_path / ".cache" / "dsv3_jax"
    assert cache_root("~/c") == tmp_path / "c"

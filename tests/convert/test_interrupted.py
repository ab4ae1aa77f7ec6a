"""Conversions as processes: killed, refused by the disk, and in little memory."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv3_jax.cli import main
from dsv3_jax.convert import export, native, opened
from dsv3_jax.convert.errors import ConversionError
from dsv3_jax.pretrained import load_pretrained, save_pretrained
from tests.convert import folders
from tests.convert.folders import HF


class Killed(Exception):
    pass


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_kill_leaves_nothing_that_loads_and_the_same_command_goes_on(tmp_path, monkeypatch, command):
    monkeypatch.setattr(native, "WHOLE", 64)  # Many chunks.
    source = folders.write(tmp_path / "hf")
    arguments = ["--from", str(source), "--to", str(tmp_path / "out")]
    written, after = [], 40 if command == "import" else 60
    module, name = (native, "_write_chunk") if command == "import" else (export, "_write_tensor")
    original = getattr(module, name)

    def counted(*args):
        if len(written) >= after:
            raise Killed
        written.append(args)
        return original(*args)

    monkeypatch.setattr(module, name, counted)
    with pytest.raises(Killed):
        main([command, *arguments])
    assert not (tmp_path / "out").exists()
    half = tmp_path / "out.partial"
    with pytest.raises(ConversionError):
        load_pretrained(half)
    # A chunk that the kill cut short, though the journal has it, is written again.
    if command == "import":
        first = json.loads((half / "journal").read_text().splitlines()[0])[0]
        (half / first).write_bytes(b"")
    total, written[:], after = len(written), [], 10**9
    assert main([command, *arguments]) == 0
    assert not half.exists()
    assert folders.equal(tmp_path / "out", source)
    monkeypatch.setattr(module, name, original)
    assert main([command, "--from", str(source), "--to", str(tmp_path / "whole")]) == 0
    with opened.open_source(source) as whole:
        chunks = sum(
            1 for p, leaf in whole.source.leaves.items() for _ in native._chunks(leaf, whole.source.dtypes[p])
        )
    if command == "import":
        # What was done is not done again, but for the one cut short and those under way at the kill.
        assert chunks - total + 1 <= len(written) <= chunks - total + 1 + native.WORKERS


def test_a_killed_process_can_be_continued(tmp_path):
    """SIGKILL in the middle of a real import, then the same command."""
    hf = HF | {"n_routed_experts": 16, "moe_intermediate_size": 256, "hidden_size": 256}
    source = folders.write(tmp_path / "hf", hf, folders.random_tensors(hf))
    command = [
        sys.executable,
        "-m",
        "dsv3_jax.cli",
        "import",
        "--from",
        str(source),
        "--to",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command)
    journal = tmp_path / "out.partial" / "journal"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    subprocess.run(command, check=True)
    assert folders.equal(tmp_path / "out", source)


@pytest.mark.parametrize("command", ["import", "export"])
def test_disk_full(tmp_path, monkeypatch, capsys, command):
    source = folders.write(tmp_path / "hf")
    out = ["--to", str(tmp_path / "out")]

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        native if command == "import" else export,
        f"_write_{'chunk' if command == 'import' else 'tensor'}",
        full,
    )
    assert main([command, "--from", str(source), *out]) == 1
    assert "No space left on device; with that mended, the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main([command, "--from", str(source), *out]) == 0


def test_too_little_space_is_seen_before(tmp_path, monkeypatch):
    config, variables = load_pretrained(folders.write(tmp_path / "hf"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="MB are needed, 0.0 MB are free"):
        save_pretrained(tmp_path / "out", config, variables)
    assert not (tmp_path / "out.partial").exists()


def peak_of(*arguments):
    """Peak memory of a command, bytes."""
    process = subprocess.Popen([sys.executable, "-m", "dsv3_jax.cli", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return usage.ru_maxrss * 1024


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """A folder of 250 MB, no tensor of it above 1 MB, takes little more memory than one of 20 kB."""
    hf = HF | {"n_routed_experts": 128, "moe_intermediate_size": 400, "hidden_size": 400}
    tensors = {name: np.zeros(shape, folders.BF16) for name, shape in folders.shapes(hf).items()}
    tensors |= {name: value.astype(np.float32) for name, value in tensors.items() if "bias" in name}
    large, small = folders.write(tmp_path / "large", hf, tensors), folders.write(tmp_path / "small")
    size = sum(file.stat().st_size for file in large.iterdir())
    assert size > 2.4e8
    for command in ("import", "export"):
        before = peak_of(command, "--from", small, "--to", tmp_path / f"{command} of small")
        peak = peak_of(command, "--from", large, "--to", tmp_path / f"{command} of large")
        assert peak - before < size / 5  # Names and places of 1,800 tensors, and a few of the tensors.

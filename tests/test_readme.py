"""The README's commands that need no folder of weights do what it says."""

import re
import shlex
from pathlib import Path

import pytest

from dsv3_jax import cli

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
COMMANDS = [
    line.split(" #")[0].strip() for line in LINES if re.match("    dsv3 (plan|inspect --config)", line)
]


def test_there_are_some():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err

"""What is said when a save cannot be written: one message, on a file system that really refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import failures

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing local file "/d/2/_sharding": Failed writing: "/d/2/_sharding.__lock": '
    "Failed to write 3075 bytes to file 13: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "/d/2"), "No space left on device"),
        (ValueError(TENSORSTORE + "\nmore"), "No space left on device"),
        (ValueError("a reason of another form\nmore"), "a reason of another form"),
    ],
)
def test_reason(error, reason):
    assert failures.reason(error) == reason


SAVE = """
import resource, sys
import jax.numpy as jnp
from dsv3_jax.checkpoint import CheckpointError, Checkpoints
from dsv3_jax.config import Config

checkpoints = Checkpoints(sys.argv[1], Config())
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoints.save(1, {f"x{i}": jnp.arange(50_000) * i for i in range(30)}, {})
    checkpoints.close()
except CheckpointError as error:
    print(error, file=sys.stderr)
"""


def test_a_refused_save_prints_one_message(tmp_path):
    """Files may not grow past 20 kB: every array fails, in threads of Orbax and of TensorStore."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SAVE, str(tmp_path / "checkpoints")]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    (line,) = out.stderr.splitlines()
    assert "The checkpoint of step 1 could not be written" in line
    assert "File too large. With that mended, the same command continues" in line

"""Saving processes under SIGKILL, at random and at chosen moments: a usable checkpoint is left."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_jax.checkpoint import Checkpoints, integrity, manager
from dsv3_jax.config import CheckpointConfig, Config
from tests.checkpoint.states import abstract, assert_same, kept, make_state

# Of processes started here, which do not inherit pytest's import path.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
DEATH_STEP = 3


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_delete_and_die(path, *_, **__) -> None:
    next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
    die()


def arrange_death(moment: str) -> None:
    """Makes this process kill itself at a chosen moment of the next save."""
    from orbax.checkpoint.path import deleter

    write, delete = integrity.write_digest, deleter.StandardCheckpointDeleter.delete
    moments = {
        "before the digest": (integrity, "write_digest", die),
        "between digest and commit": (integrity, "write_digest", lambda path: (write(path), die())),
        "after the commit": (deleter.StandardCheckpointDeleter, "delete", die),
        "after moving to the trash": (
            deleter.StandardCheckpointDeleter,
            "delete",
            lambda self, step: (delete(self, step), die()),
        ),
        "while emptying the trash": (manager.shutil, "rmtree", half_delete_and_die),
    }
    setattr(*moments[moment])


def run_saver(directory: str, moment: str) -> None:
    """Resumes and saves without end, keeping a journal of what it began and what it knows committed."""
    journal = os.open(f"{directory}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    checkpoints = Checkpoints(
        Path(directory) / "c", Config(checkpoint=CheckpointConfig(keep_last=1, keep_best=1))
    )
    restored = checkpoints.restore_latest(abstract(make_state(0)))
    first = restored.step if restored else 0
    for step in range(first + 1, first + 200):
        if step == DEATH_STEP and moment:
            arrange_death(moment)
        os.write(journal, f"begin {step}\n".encode())
        # Losses go up and down, so that the best is often not the newest.
        checkpoints.save(step, make_state(step), {"at": step}, {"validation_loss": step % 5})
        if step % 3 != 0:
            checkpoints.wait()
            os.write(journal, f"committed {step}\n".encode())


def run_server() -> None:
    """Forks a saver a line of input, so that each does not pay for the imports."""
    import orbax.checkpoint  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Children are reaped by the kernel.
    for line in sys.stdin:
        directory, _, moment = line.strip().partition("\t")
        pid = os.fork()
        if pid == 0:
            run_saver(directory, moment)
            os._exit(1)
        print(pid, flush=True)


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip

    def start(directory, moment="") -> int:
        process.stdin.write(f"{directory}\t{moment}\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield start
    process.stdin.close()
    process.stdout.close()
    process.wait()


def wait_until(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def gone(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def read_journal(directory, word):
    path = directory / "journal"
    text = path.read_text() if path.exists() else ""
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith(word)]


def check_usable(directory) -> int:
    """The newest checkpoint is sound, whole, and no older than what was known to be committed."""
    restored = Checkpoints(directory / "c", Config()).restore_latest(abstract(make_state(0)))
    committed, began = read_journal(directory, "committed"), read_journal(directory, "begin")
    if restored is None:
        assert not committed
        return 0
    assert max(committed, default=0) <= restored.step <= max(began)
    assert restored.extras == {"at": restored.step}
    assert_same(restored.state, make_state(restored.step))
    assert not list((directory / "c").glob("*.damaged"))
    # The kept ones are sound too.
    assert all(integrity.problems(directory / "c" / str(step)) == [] for step in kept(directory / "c"))
    return restored.step


def test_sigkill_at_random_moments_leaves_a_usable_latest(tmp_path, server):
    chance, steps = random.Random(0), []
    for turn in range(6):
        # However slow the disk, the last has committed one.
        word = "begin" if turn < 5 else "committed"
        already = len(read_journal(tmp_path, word))
        pid = server(tmp_path)
        wait_until(lambda n=already, word=word: len(read_journal(tmp_path, word)) > n)
        time.sleep(chance.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: gone(pid))
        steps.append(check_usable(tmp_path))
    assert steps == sorted(steps) and steps[-1] > 0


@pytest.mark.parametrize(
    ("moment", "committed"),
    [
        ("before the digest", False),
        ("between digest and commit", False),
        ("after the commit", True),
        ("after moving to the trash", True),
        ("while emptying the trash", True),
    ],
)
def test_sigkill_at_chosen_moments_leaves_a_usable_latest(tmp_path, server, moment, committed):
    pid = server(tmp_path, moment)
    wait_until(lambda: gone(pid))
    latest = check_usable(tmp_path)
    # The trash is emptied beside the save, which may then finish or not.
    expected = {"while emptying the trash": (DEATH_STEP - 1, DEATH_STEP)}
    assert latest in expected.get(moment, (DEATH_STEP if committed else DEATH_STEP - 1,))
    # The next run tidies up and goes on.
    checkpoints = Checkpoints(tmp_path / "c", Config())
    checkpoints.save(latest + 1, make_state(latest + 1), {})
    checkpoints.close()
    assert all(path.name.isdigit() for path in (tmp_path / "c").iterdir())


if __name__ == "__main__":
    run_server()

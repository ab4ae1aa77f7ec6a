"""Jobs of several real processes: a lost one ends the others, and any number of them goes on with the run."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import running
from tests.running import STEPS, checkpoint_steps, curve, unbroken

runner = running.runner
# As for one process on several devices (tests/test_train_meshes.py): sums over devices in another order.
TOLERANCE = 5e-6
LIMIT = 900  # Seconds; only a hang takes so long, however busy the machine.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def serve() -> None:
    """Forks a process of `train.py` a line of input, so that only the first pays for the imports."""
    import train
    from dsv3_jax.checkpoint import manager  # noqa: F401
    from dsv3_jax.training import ema, ema_beside, loop  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            done, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if done else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os.environ.update(request["environment"])
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if request["count"] > 1:
                share_compilation()
            if request["beside"]:
                ema_beside.applies = lambda config, _: config.train.ema_decay > 0
                ema_beside.BLOCK_BYTES = 256  # In pieces.
            try:
                code = train.main(request["arguments"])
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)


def share_compilation() -> None:
    """One process of a job compiles for all: they are alike, though JAX takes each for another machine."""
    import jax
    from jax._src import cache_key

    jax.config.update("jax_share_binary_between_hosts", True)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    cache_key._hash_accelerator_config = lambda hashed, devices: hashed.update(b"cpu")


@pytest.fixture(scope="module")
def ask(runner):
    """A question to the server of processes and its answer; what still runs at the end is killed."""
    server = subprocess.Popen(
        [sys.executable, "-W", "error", __file__], cwd=running.ROOT, env=runner.environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = set()

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        if "poll" not in request:
            started.add(answer)
        elif answer is not None:
            started.remove(request["poll"])
        return answer

    yield ask
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    server.stdin.close()
    server.stdout.close()
    server.wait()


class Job:
    """The processes of one `train.py`, each with its own output.

    Args:
      place: the flags and variables that tell process i of an address which it is.
      beside: the step updates the average, as on GPUs.
    """

    def __init__(self, ask, runner, workdir: Path, count: int, *options: str, place=None, beside=False):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        source = (f"data.source=files:{runner.texts}/*.txt", f"data.cache_dir={runner.shared / 'tokens'}")
        common = ["--config=tests/running.py", f"--workdir={workdir}"]
        common += [f"--config.{option}" for option in (*source, "checkpoint.every=5", *options)]
        self._ask, self.count = ask, count
        self.outputs = [workdir.with_name(f"{workdir.name}.{count}.{i}") for i in range(count)]
        self.pids, self.codes = [], [None] * count
        for i, output in enumerate(self.outputs):
            flags, variables = place(address, count, i) if place else ([], {})
            variables["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=1"
            request = {"arguments": common + flags, "environment": variables, "output": str(output)}
            self.pids.append(ask(request | {"count": count, "beside": beside}))

    def poll(self) -> list[int | None]:
        """The exit codes of those that have ended."""
        for i, pid in enumerate(self.pids):
            if self.codes[i] is None:
                self.codes[i] = self._ask({"poll": pid})
        return self.codes

    def until(self, condition) -> None:
        """Waits for a condition while all processes run."""
        limit = time.monotonic() + LIMIT
        for turn in itertools.count():
            if condition():
                return
            if turn % 20 == 0:  # Rarer: it is a question to the server.
                assert time.monotonic() < limit and self.poll() == [None] * self.count, self.everything()
            time.sleep(0.02)

    def wait(self) -> list[int]:
        limit = time.monotonic() + LIMIT
        while None in self.poll():
            assert time.monotonic() < limit, self.everything()
            time.sleep(0.1)
        assert "Traceback" not in self.everything(), self.everything()
        return self.codes

    def text(self, i: int) -> str:
        """What process i printed, without what XLA's library of collectives prints of itself."""
        text = self.outputs[i].read_text(errors="replace")
        return "".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]"))

    def everything(self) -> str:
        return "\n".join(f"--- {i}: {self.codes[i]}\n{self.text(i)}" for i in range(self.count))


def by_flags(address, count, i):
    return [f"--coordinator={address}", f"--num-processes={count}", f"--process-id={i}"], {}


def as_in_kubernetes(address, count, i):
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [], variables | {"JOB_COMPLETION_INDEX": str(i)}


def as_in_slurm(address, count, i):
    """Tasks of a step that runs here; its port follows from the job, here a number that nobody else has."""
    variables = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1"}
    return [], variables | {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(i)}


def lost(i, count):
    return (
        f"process {i} of {count}, on {socket.gethostname()}, was lost; "
        "the same command continues from the last checkpoint"
    )


def test_processes_are_lost_and_other_numbers_of_them_go_on_with_the_same_run(ask, runner, tmp_path):
    workdir = tmp_path / "run"

    def saved(beyond: int) -> bool:
        return (workdir / "checkpoints").exists() and max(checkpoint_steps(workdir), default=0) > beyond

    # Two processes; the second is lost while they train. The first says so, and which.
    job = Job(ask, runner, workdir, 2, "mesh.data=-1", place=by_flags)
    job.until(lambda: saved(5))  # Step 10 is evaluated.
    os.kill(job.pids[1], signal.SIGKILL)
    assert job.wait() == [4, -signal.SIGKILL], job.everything()
    assert job.text(0).splitlines()[-1] == lost(1, 2)
    assert "on 2 x cpu of 2 processes" in job.text(0)
    assert job.text(1) == ""  # The first alone reports.
    last = checkpoint_steps(workdir)[-1]

    # Four, which share experts, parameters and moments; the first, which the others wait for, is lost.
    options = ("mesh.data=2", "mesh.expert=2", "mesh.sharding=fsdp", "train.eval_every=0")
    job = Job(ask, runner, workdir, 4, *options, place=as_in_kubernetes)
    job.until(lambda: saved(last))
    assert f"resumed at step {last}" in job.text(0)
    os.kill(job.pids[0], signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL, 4, 4, 4], job.everything()
    assert [job.text(i).splitlines()[-1] for i in (1, 2, 3)] == [lost(0, 4)] * 3
    last = checkpoint_steps(workdir)[-1]

    # Two again; one is asked to stop. Both stop after the same step, and save it.
    job = Job(ask, runner, workdir, 2, "mesh.data=-1", place=as_in_slurm)
    job.until(lambda: f"step {last + 2}/" in job.text(0))
    os.kill(job.pids[1], signal.SIGTERM)
    assert job.wait() == [143, 143], job.everything()
    assert f"resumed at step {last}" in job.text(0)
    last = checkpoint_steps(workdir)[-1]
    assert f"stopped on request after step {last}: saved" in job.text(0)
    assert job.text(1).strip().startswith("stopping after this step") and last < STEPS

    # And alone, to the end.
    job = Job(ask, runner, workdir, 1)
    assert job.wait() == [0] and f"resumed at step {last}" in job.text(0), job.everything()
    ours, expected = curve(workdir), curve(unbroken(runner))
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for mine, theirs in zip(ours, expected, strict=True):
        for name in ("loss", "ce_loss", "mtp_loss", "grad_norm", "balance_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE), (mine["step"], name)
        for name in ("tokens", "learning_rate", "max_vio"):  # Counts of tokens are exact.
            assert mine[name] == theirs[name], (mine["step"], name)
        if mine["step"] in (10, STEPS):  # Of two processes, and of one.
            assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=TOLERANCE)


def average(workdir: Path) -> dict:
    """The moving average in the newest checkpoint."""
    path = workdir / "checkpoints" / str(checkpoint_steps(workdir)[-1]) / "state"
    reader = ocp.PyTreeCheckpointer()
    shapes = reader.metadata(path).item_metadata.tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    return reader.restore(path, restore_args=whole)["ema"]


def test_processes_that_update_the_average_beside_the_step(ask, runner, tmp_path):
    """As by a program of its own after every step, of the same run."""
    options = ("mesh.data=2", "mesh.sharding=fsdp", "train.eval_every=0", "train.steps=6")
    options += ("train.ema_decay=0.7", "train.ema_memory=host")
    found = []
    for beside in (True, False):
        workdir = tmp_path / f"run{beside}"
        job = Job(ask, runner, workdir, 2, *options, place=by_flags, beside=beside)
        assert job.wait() == [0, 0], job.everything()
        found.append((curve(workdir), average(workdir)))
    (ours, mine), (theirs, other) = found
    assert [record["loss"] for record in ours] == pytest.approx([x["loss"] for x in theirs], rel=TOLERANCE)
    for x, y in zip(*map(jax.tree.leaves, (mine, other)), strict=True):
        # So far the same bits, of two programs: another compiler may round sums otherwise.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


if __name__ == "__main__":
    serve()

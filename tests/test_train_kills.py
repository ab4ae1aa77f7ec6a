"""A run survives: kills and stops at any moment leave the loss curve of an unbroken run, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests import running
from tests.running import STEPS, checkpoint_steps, curve, end, kill, lines, noise, unbroken, until

runner = running.runner
# Accumulation under a batch-size ramp, bf16 moments, an average of the parameters, FIM and document masks.
EVERYTHING = (
    "model.moe.n_dense_layers=1",
    "train.micro_batch_size=2",
    "train.ramp_start_batch=4",
    "train.ramp_until=0.5",
    "train.ema_decay=0.9",
    "optimizer.moment_dtype=bfloat16",
    "data.fim_rate=0.5",
    "data.mask_documents=true",
)


def writing_a_checkpoint(workdir, beyond):
    """Whether a checkpoint of a step after `beyond` is being written."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return any(name.endswith("-tmp") and int(name.split(".")[0]) > beyond for name in names)


@pytest.mark.parametrize(
    ("options", "kills"), [((), "step write write"), (EVERYTHING, "write")], ids=["plain", "everything"]
)
def test_killed_anywhere_and_continued_is_bitwise_the_unbroken_run(runner, tmp_path, options, kills):
    workdir, chance, seen = tmp_path / "run", random.Random(), 0
    for moment in kills.split():
        process = runner.start(workdir, *options)
        if moment == "write":  # While a checkpoint is being written, at any moment of it.
            until(lambda step=seen: writing_a_checkpoint(workdir, step), process, workdir)
        else:
            more = chance.randint(1, 5)
            until(lambda n=seen + more: lines(workdir / "metrics.jsonl") > n, process, workdir)
        time.sleep(chance.uniform(0, 0.05))
        kill(process, workdir)
        assert noise(running.printed(workdir).read_text()) == []
        seen = curve(workdir)[-1]["step"]
    # A kill while the first checkpoint of all is being written leaves none to resume from.
    folder = workdir / "checkpoints"
    resumable = any(name.isdigit() for name in os.listdir(folder))
    ended = runner.run(workdir, *options)
    assert ended.code == 0 and noise(ended.output) == []
    assert ("resumed at step" in ended.output) == resumable
    assert [record["step"] for record in curve(workdir)] == list(range(1, STEPS + 1))
    assert curve(workdir) == curve(unbroken(runner, *options))


def test_stops_on_request_and_more_steps_are_bitwise_the_unbroken_run(runner, tmp_path):
    workdir = tmp_path / "run"
    log = workdir / "metrics.jsonl"

    # SIGTERM while the first step compiles: that step is finished, and saved.
    process = runner.start(workdir, environment={"JAX_ENABLE_COMPILATION_CACHE": "false"})
    until(lambda: b"parameters on" in running.printed(workdir).read_bytes(), process, workdir)
    time.sleep(0.5)
    assert lines(log) == 0
    process.send_signal(signal.SIGTERM)
    ended = end(process, workdir)
    assert ended.code == 0 and noise(ended.output) == []
    assert "stopped on request after step 1: saved; the same command continues" in ended.output
    assert checkpoint_steps(workdir) == [1]

    # Ctrl-C while it trains.
    process = runner.start(workdir)
    until(lambda: lines(log) >= 4, process, workdir)
    process.send_signal(signal.SIGINT)
    ended = end(process, workdir)
    assert ended.code == 130 and noise(ended.output) == []
    last = curve(workdir)[-1]["step"]
    assert f"stopped on request after step {last}: saved" in ended.output
    assert checkpoint_steps(workdir)[-1] == last < 20

    # To its end, and then more steps in the same place.
    for steps, resumed in ((20, last), (STEPS, 20)):
        ended = runner.run(workdir, f"train.steps={steps}")
        assert ended.code == 0 and f"resumed at step {resumed}" in ended.output
    assert curve(workdir) == curve(unbroken(runner))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_before_there_is_anything_to_save(runner, tmp_path, number, code):
    process = runner.start(tmp_path / "run")
    time.sleep(0.7)  # It imports.
    process.send_signal(number)
    ended = end(process, tmp_path / "run")
    assert ended.code == code
    assert ended.output.strip() == "stopped; the same command continues from the last checkpoint"


def test_an_impatient_second_ctrl_c_ends_the_run_at_once(runner, tmp_path):
    """The step under way never ends here: without a second Ctrl-C neither would the process."""
    code = (
        "import sys, time, train; from dsv3_jax.training import loop\n"
        "loop.put_batch = lambda *_: (print('waiting', flush=True), [time.sleep(0.1) for _ in range(3000)])\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    workdir = tmp_path / "run"
    process = runner.start(workdir, program=("-c", code))
    until(lambda: b"waiting" in running.printed(workdir).read_bytes(), process, workdir)
    process.send_signal(signal.SIGINT)
    until(lambda: b"stopping after this step" in running.printed(workdir).read_bytes(), process, workdir)
    process.send_signal(signal.SIGINT)
    assert end(process, workdir).code == 130


CUT_SHORT = """
import glob, os, sys, jax
from dsv3_jax import compilation_cache
compilation_cache.use("unused")
def f(x):
    return 2 * x + 1
sizes = []
for _ in range(3):
    jax.jit(f)(1.0)
    jax.clear_caches()
    (path,) = glob.glob(sys.argv[1] + "/jit_f-*-cache")
    sizes.append(os.path.getsize(path))
    if len(sizes) == 1:
        os.truncate(path, sizes[0] // 2)
assert min(sizes) > 0.9 * sizes[0], sizes  # The entry holds its own compile time, so sizes vary by a byte.
"""


def test_a_compiled_program_that_a_kill_cut_short_is_made_anew(runner, tmp_path):
    variables = runner.environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CUT_SHORT, str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

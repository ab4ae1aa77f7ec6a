"""How a process of a job ends when another one does; processes that hold a lifeline and nothing else."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
CONTINUES = "the same command continues from the last checkpoint"
# Process INDEX of COUNT, which reads from its input what to do. FILE is where process 0 says its port.
PROCESS = """
import json, os, signal, sys, time
from pathlib import Path
from dsv3_jax.parallel.lifeline import Lifeline

index, count, file = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def from_first(make):
    if index == 0:
        file.with_suffix(".new").write_text(json.dumps(make()))
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return json.loads(file.read_text())

lifeline = Lifeline(index, count, "localhost", from_first)
print("joined", flush=True)
word = sys.stdin.readline().strip()
if word == "bye":
    lifeline.bye()
elif word == "abort":
    # As JAX does when process 0 is gone: from C, while other threads run.
    import ctypes
    ctypes.CDLL(None).abort()
elif word:
    lifeline.leave(int(word))
    os._exit(int(word))
"""


@pytest.fixture
def job(tmp_path):
    """Three processes that have joined; a stranger has knocked before."""
    processes = []
    for index in range(3):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", PROCESS, str(index), "3", str(tmp_path / "port")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
        if index == 0:
            while not (tmp_path / "port").exists():
                assert processes[0].poll() is None
            port, _ = json.loads((tmp_path / "port").read_text())
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(b"guess 1 stranger\n")
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def say(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()


def ends(process):
    """The exit code and the last line of a process; the 60 seconds are for a busy machine."""
    code = process.wait(timeout=60)
    return code, "".join(process.stderr.read().splitlines()[-1:])


@pytest.mark.parametrize("gone", [0, 2])
def test_a_process_that_is_killed_ends_the_others_with_its_name(job, gone):
    job[gone].send_signal(signal.SIGKILL)
    for process in job[:gone] + job[gone + 1 :]:
        assert ends(process) == (4, f"process {gone} of 3, on {HOST}, was lost; {CONTINUES}")


def test_the_name_comes_before_an_abort(job):
    say(job[1], "abort")
    job[0].send_signal(signal.SIGKILL)
    for process in job[1:]:
        assert ends(process) == (4, f"process 0 of 3, on {HOST}, was lost; {CONTINUES}")


def test_an_abort_of_its_own_is_only_delayed(job):
    say(job[1], "abort")
    assert ends(job[1])[0] == -signal.SIGABRT
    assert ends(job[0]) == ends(job[2]) == (4, f"process 1 of 3, on {HOST}, was lost; {CONTINUES}")


@pytest.mark.parametrize(
    ("leaving", "code", "message"),
    [
        (1, 3, "process 1 of 3, on {}, ended with exit code 3"),
        (0, 2, "process 0 of 3, on {}, ended with exit code 2"),
        (2, 143, "stopped, as process 2 of 3, on {}, was asked to"),
        (0, 130, "stopped, as process 0 of 3, on {}, was asked to"),
    ],
)
def test_a_process_that_ends_takes_the_others_with_it(job, leaving, code, message):
    say(job[leaving], str(code))
    assert ends(job[leaving]) == (code, "")
    for process in job[:leaving] + job[leaving + 1 :]:
        assert ends(process) == (code, f"{message.format(HOST)}; {CONTINUES}")


def test_at_the_end_of_a_run_nobody_is_lost(job):
    for process in job:
        say(process, "bye")
    assert [ends(process) for process in job] == [(0, "")] * 3

"""Runs of `python train.py` in processes of their own, to be killed and continued, on a very small model."""

import contextlib
import fcntl
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 30
# What may differ between two runs of the same steps: how fast they were.
SPEED = ("tokens_per_second", "mfu", "peak_memory_gib")
# Everything that a run may print. What else a library prints is noise, and a traceback is a defect.
EXPECTED = re.compile(
    r"0\.0M parameters on|resumed at step|no checkpoint in .*: starting anew|step \d+/\d+  loss"
    r"|step \d+ was not finite|loss spike at step|checkpoint .* is damaged:|moved it to"
    r"|stopping after this step|stopped on request|validation loss|in .*: metrics\.jsonl|$"
)


def get_config():
    """The configuration: `--config=tests/running.py`."""
    from dsv3_jax.config import config_dict

    attention = dict(n_heads=2, q_lora_rank=8, kv_lora_rank=8)
    attention |= dict(qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4)
    moe = dict(n_experts=4, top_k=2, d_ff_expert=16, n_groups=2, topk_groups=1)
    moe |= dict(n_dense_layers=0, bias_speed=0.01)
    model = dict(vocab_size=261, d_model=16, n_layers=2, d_ff=32, max_seq_len=16, init_std=0.05)
    return config_dict(
        model=dict(model, attention=attention, moe=moe, mtp=dict(depth=1)),
        data=dict(validation_fraction=0.2),
        # The budget is fixed, so that `train.steps` decides only where a run ends.
        train=dict(
            steps=STEPS, token_budget=STEPS * 8 * 16, seq_len=16, batch_size=8, precision="fp32", log_every=1,
            eval_every=10, eval_batches=2, sample_tokens=0, max_bad_steps=3,
        ),
        optimizer=dict(peak_lr=4e-3, warmup_steps=2),
        checkpoint=dict(every=2, keep_last=2, keep_best=1),
        mesh=dict(data=1, expert=1),
    )  # fmt: skip


class Ended(NamedTuple):
    """A process that has ended."""

    code: int  # Minus the signal that killed it.
    output: str  # stdout and stderr.


class Runner:
    """Starts runs of the same text, with one cache of compiled programs between them.

    Args:
      shared: a folder for text, caches and `once`; other test processes may use it at the same time.
    """

    def __init__(self, shared: Path):
        self.shared = shared
        self.texts = shared / "texts"
        with self.alone("texts"):
            if not self.texts.exists():
                write_texts(self.texts)
                # A stub: TensorBoardX imports torch where it finds it, which takes longer than a whole run.
                (shared / "stubs").mkdir()
                (shared / "stubs/torch.py").write_text("raise ImportError")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        self.environment |= {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{shared / 'stubs'}",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(shared / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Waits until no other test process is in the block of that name."""
        with open(self.shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def once(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder that `make(folder)` fills, made by the first of all test processes to ask."""
        folder = self.shared / name
        with self.alone(name):
            if not (folder / "made").exists():
                make(folder)
                (folder / "made").touch()
        return folder

    def start(
        self,
        workdir: Path,
        *options: str,
        devices: int = 1,
        program: tuple[str, ...] = ("train.py",),
        output: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        """Starts the command, with warnings as errors, printing to `WORKDIR.output`.

        Args:
          workdir: of the run.
          options: `section.field=value`.
          devices: how many the CPU pretends to be.
          program: what Python runs.
          output: a file descriptor to print to instead.
          environment: more variables.
        """
        arguments = ["--config=tests/running.py", f"--workdir={workdir}"]
        source = (f"data.source=files:{self.texts}/*.txt", f"data.cache_dir={self.shared / 'tokens'}")
        arguments += [f"--config.{option}" for option in (*source, *options)]
        command = [sys.executable, "-W", "error", *program, *arguments]
        # Optimising such small programs takes LLVM longer than running them.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        flags += f" --xla_force_host_platform_device_count={devices}"
        variables = self.environment | {"XLA_FLAGS": flags} | (environment or {})
        with contextlib.ExitStack() as stack:
            to = output if output is not None else stack.enter_context(printed(workdir).open("wb"))
            return subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=to, stderr=to
            )

    def run(self, workdir: Path, *options: str, **more) -> Ended:
        """Runs the command to its end."""
        return end(self.start(workdir, *options, **more), workdir)


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Runner:
    """One `Runner` for all test processes of a session; `runner = running.runner` in a test file."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    (shared / "runs").mkdir(exist_ok=True)
    return Runner(shared / "runs")


def printed(workdir: Path) -> Path:
    """What the last process of a run printed."""
    return workdir.with_name(workdir.name + ".output")


def write_texts(folder: Path, seed: int = 0) -> None:
    """Twenty documents of words, of various lengths; the folder appears whole."""
    chance = random.Random(seed)
    words = "def return self import for in if else None True print yield".split()
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir()
    for i in range(20):
        text = " ".join(chance.choices(words, k=chance.randint(20, 120)))
        (temporary / f"{i:02}.txt").write_text(text)
    temporary.rename(folder)


def unbroken(runner: Runner, *options: str) -> Path:
    """The work directory of a run that nothing disturbed, on a terminal whose text is in `terminal`."""

    def make(folder: Path) -> None:
        folder.mkdir()
        ours, theirs = pty.openpty()
        process = runner.start(folder / "run", *options, output=theirs)
        os.close(theirs)
        with (folder / "terminal").open("wb") as file, contextlib.suppress(OSError):  # Linux's end of file.
            while data := os.read(ours, 4096):
                file.write(data)
        os.close(ours)
        assert process.wait() == 0, (folder / "terminal").read_text()

    return runner.once(f"unbroken_{zlib.crc32(repr(options).encode())}", make) / "run"


def end(process: subprocess.Popen, workdir: Path) -> Ended:
    """Waits for a process; what it printed must be expected, and never a traceback."""
    code = process.wait(timeout=300)
    output = printed(workdir).read_text()
    assert "Traceback" not in output and "Warning" not in output, output
    return Ended(code, output)


def noise(output: str) -> list[str]:
    """The lines of an undisturbed run that are none of its own."""
    return [line for line in output.splitlines() if not EXPECTED.match(line)]


def until(condition: Callable[[], Any], process: subprocess.Popen, workdir: Path) -> None:
    """Waits for a condition while the process runs."""
    limit = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, printed(workdir).read_text()
        time.sleep(0.001)


def lines(path: Path) -> int:
    """Lines of a file, 0 if there is none yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def curve(workdir: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` without those of speed. Floats are compared bit for bit by ==."""
    from dsv3_jax.training.report import METRICS_FILE, read_metrics

    records = read_metrics(workdir / METRICS_FILE)
    return [{name: value for name, value in record.items() if name not in SPEED} for record in records]


def checkpoint_steps(workdir: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def copy(workdir: Path, to: Path) -> Path:
    """A copy of a run, to be harmed."""
    shutil.copytree(workdir, to)
    return to


def kill(process: subprocess.Popen, workdir: Path) -> None:
    """SIGKILL; the process must have been running."""
    process.send_signal(signal.SIGKILL)
    assert end(process, workdir).code == -signal.SIGKILL

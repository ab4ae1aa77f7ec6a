"""What a run shows while it trains: a live line, `metrics.jsonl`, and TensorBoard events."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


class NoReport:
    """The report of a process that shows nothing: of several, all but the first."""

    dropped = 0

    def log(self, metrics: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Report:
    """Everything that a run shows, behind one `log`.

    Args:
      workdir: where `metrics.jsonl` and the folder `tensorboard` go; it exists.
      total_steps: steps of the whole run.
      resumed_step: steps already taken; lines of later steps are dropped from the files.
      stream: where the live line goes.

    Attributes:
      dropped: how many lines of later steps there were.
    """

    def __init__(
        self, workdir: str | Path, total_steps: int, resumed_step: int = 0, stream: TextIO | None = None
    ):
        workdir = Path(workdir)
        self._metrics = MetricsLog(workdir / METRICS_FILE, resumed_step)
        self.dropped = self._metrics.dropped
        self._events = _Events(workdir / TENSORBOARD_DIR, resumed_step)
        self._progress = Progress(total_steps, stream)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Records one step: `metrics["step"]`, and numbers or arrays of numbers under any other keys.

        The line and the events are on disk, or with the operating system, when this returns: log a step
        before its checkpoint, and a run that is killed and resumed misses no line.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        self._metrics.write(values)
        self._events.write(values)
        self._progress.update(values)

    def note(self, text: str) -> None:
        """Prints a line of text without disturbing the live line."""
        self._progress.note(text)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        self._progress.close()


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


class MetricsLog:
    """Appends one JSON object a logged step; floats are written so that they read back exactly.

    Not-a-number and infinities are written as null, which every JSON reader accepts. Opening repairs the
    file: a last line that a kill cut short goes, and so does every step after `resumed_step`.
    """

    def __init__(self, path: str | Path, resumed_step: int = 0):
        path = Path(path)
        self.dropped = _drop_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        line = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order, without a line that a kill cut short."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _drop_after(path: Path, step: int) -> int:
    """Leaves whole lines up to `step`; returns how many of later steps there were."""
    if not path.exists():
        return 0
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if text == path.read_text(encoding="utf-8"):
        return 0
    # Written beside and renamed: a kill leaves the old file or the new one, whole.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(records) - len(kept)


class Progress:
    """One line about the run: rewritten in place on a terminal, printed anew each time elsewhere."""

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._clock = clock
        self._last: tuple[int, float] | None = None  # Step and time of the last update.
        self._seconds_a_step: float | None = None
        self._line = ""

    def update(self, values: Mapping[str, Any]) -> None:
        """Shows the step, and of `values` what it holds of loss, speed, balance, rate and bad steps."""
        step, now = values["step"], self._clock()
        # The time before the first update is no measure of speed: it holds the compilation.
        if self._last is not None and step > self._last[0]:
            recent = (now - self._last[1]) / (step - self._last[0])
            smooth = self._seconds_a_step
            self._seconds_a_step = recent if smooth is None else 0.7 * smooth + 0.3 * recent
        self._last = (step, now)
        self._line = self._format(step, values)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + self._line[:width])
        else:
            self._stream.write(self._line + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        if self._live and self._line:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{text}\n{self._line[:width]}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._live and self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._line = ""

    def _format(self, step: int, values: Mapping[str, Any]) -> str:
        parts = [f"step {step}/{self._total}"]
        formats = {
            "loss": "loss {:.4f}",
            "validation_loss": "validation {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "max_vio": "MaxVio {:.2f}",
            "learning_rate": "lr {:.2e}",
        }
        for name, text in formats.items():
            if name in values:
                parts.append(text.format(_worst(values[name])))
        left = self._total - step
        if left > 0 and self._seconds_a_step is not None:
            parts.append(f"ETA {_duration(left * self._seconds_a_step)}")
        if bad := values.get("bad_steps"):
            parts.append(f"{bad} bad step" + ("s" if bad > 1 else ""))
        return "  ".join(parts)


class _Events:
    """TensorBoard events. The library is imported at the first one: it takes a second."""

    def __init__(self, directory: Path, resumed_step: int):
        self._directory = directory
        self._resumed_step = resumed_step
        self._writer: Any = None

    def write(self, values: Mapping[str, Any]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # Events of steps that will be taken again are hidden.
            purge = self._resumed_step + 1 if self._resumed_step else None
            self._writer = SummaryWriter(str(self._directory), purge_step=purge)
        for name, value in values.items():
            if name == "step":
                continue
            items = enumerate(value) if isinstance(value, list) else [("", value)]
            for index, item in items:
                if isinstance(item, int | float):
                    tag = name if index == "" else f"{name}/{index}"
                    self._writer.add_scalar(tag, item, values["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _plain(value: Any) -> Any:
    """Python numbers, lists and strings of a number, a NumPy or JAX array, or a list of them."""
    if isinstance(value, str | int | bool | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(np.asarray(value).tolist())


def _worst(value: Any) -> float:
    """The number to show for one that may be a list, or null because it was not finite."""
    numbers = value if isinstance(value, list) else [value]
    return max((math.nan if number is None else number for number in numbers), default=math.nan)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

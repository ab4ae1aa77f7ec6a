"""What several subcommands need."""

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any


def on_cpu() -> None:
    """Keeps JAX off accelerators, which a conversion does not need."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def fail(error: object, code: int = 1) -> int:
    """Prints an error without a traceback; the exit code."""
    print(error, file=sys.stderr)
    return code


def load_config(path: Path) -> Any:
    """The ConfigDict of a configuration file.

    Raises:
      ConfigError: there is no such file.
    """
    from dsv3_jax.config_reading import ConfigError, Problem

    spec = importlib.util.spec_from_file_location("run_config", path)
    if not path.is_file() or spec is None or spec.loader is None:
        names = ", ".join(sorted(map(str, Path("configs").glob("*.py"))))
        raise ConfigError([Problem("config", str(path), f"no such file; there are {names}")])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


class Progress:
    """One line that is rewritten on a terminal, and a line every ten seconds elsewhere."""

    def __init__(self, what: str):
        self._what, self._start, self._shown, self._first = what, time.monotonic(), 0.0, None
        self.done = self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self._first = done if self._first is None else self._first
        self.done, self.total = done, total
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._shown < (0.2 if terminal else 10) and done < total:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        line = f"{self._what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s{left}"
        print(
            f"\r{line:<70}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
        )
        if terminal and done >= total:
            print(file=sys.stderr)

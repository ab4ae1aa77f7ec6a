"""Times rival programs on a CPU that other work may share, and says what machine it was.

Rivals take turns within one process, so that both meet the same disturbances, and every figure is a
median. Wall time is what a user waits for; CPU seconds beside it (user and system, all threads) hardly
change when others take cores away.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Seconds(NamedTuple):
    """Medians over the calls of one rival."""

    wall: float
    cpu: float
    fastest: float  # The least wall time.


def alternate(
    rivals: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int = 1, warmups: int = 1
) -> dict[str, Seconds]:
    """Times rivals in turns.

    Args:
      rivals: each does its work once and returns when it is done.
      rounds: how often each gets its turn; the order turns by one every round.
      calls: calls in one turn.
      warmups: calls of each that come first and do not count.

    Returns:
      The medians over all calls of each rival.
    """
    names = list(rivals)
    for name in names:
        for _ in range(warmups):
            rivals[name]()
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            for _ in range(calls):
                # process_time counts all threads, to the nanosecond; os.times counts in ticks of 10 ms.
                start, start_cpu = time.perf_counter(), time.process_time()
                rivals[name]()
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    return {
        name: Seconds(statistics.median(wall[name]), statistics.median(cpu[name]), min(wall[name]))
        for name in names
    }


def machine() -> dict[str, Any]:
    """The processor, the load at this moment, the versions of what takes part, and the date."""
    model = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for name, _, value in fields if name.strip() == "model name"), model)
    packages = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": packages,
    }


def write(path: str | os.PathLike[str], rows: Any, **details: Any) -> None:
    """Writes results as JSON: the machine, the details of the run, the rows."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), **details, "rows": rows}, indent=1) + "\n")

"""Bubbles of every schedule on 8 fake CPU devices beside the simulator's, and compile time by micro-batches.

    python benchmarks/pipeline.py [--ranks 8] [--microbatches 16] [--unit 0.5] [--out FILE]

The chunks sleep and compute next to nothing: F, I and W one unit each, so that eight devices need no eight
cores. Every sleep is recorded with its rank; the bubble is what is left of the time between the first start
and the last end. Fake devices meet in every collective, so the measured bubble is compared with the
simulator's for ranks that step together (`simulate_in_step`), with the mean times that the cells and the
meetings took: the latter are milliseconds in which nobody works. `units`: the same with F, I and W one
unit and meetings that take no time; `free`: with ranks that wait for their operands only.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from pipeline_profile import beside_the_simulator  # noqa: E402

from dsv3_jax.pipeline import NAMES, Durations, ScheduleError, build, place, simulate  # noqa: E402
from dsv3_jax.pipeline.runner import Parts, gradients  # noqa: E402
from dsv3_jax.pipeline.simulator import simulate_in_step  # noqa: E402

UNITS = Durations(forward=1, backward=2, weight=1)


class Sleeper:
    """A stage that sleeps where a real one computes, and writes down when."""

    def __init__(self, seconds: float, n_ranks: int):
        self.records: list[tuple[int, str, float, float]] = []  # Rank, kind, start, end.
        self.seconds = seconds
        self._busy = [threading.Lock() for _ in range(n_ranks)]  # A rank does one thing at a time.

    def __call__(self, kind: str, value: jax.Array) -> jax.Array:
        """`value`, later."""

        def sleep(rank, value):
            with self._busy[int(rank)]:
                start = time.perf_counter()
                time.sleep(self.seconds)
                self.records.append((int(rank), kind, start, time.perf_counter()))
            return np.asarray(value)

        shape = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return jax.pure_callback(sleep, shape, jax.lax.axis_index("pipe"), value)

    def parts(self) -> Parts:
        """A model of scalars, whose backward needs nothing of its forward."""

        @jax.custom_vjp
        def stage(weight, x):
            return self("F", x + weight)

        def backward(_, dy):
            return self("W", dy.sum()), self("I", dy)

        stage.defvjp(lambda weight, x: (stage(weight, x), None), backward)
        zero = jnp.zeros(())
        return Parts(
            embed=lambda shared, micro: micro,
            body=lambda weight, x, micro, index: (stage(weight, x), zero, ()),
            head=lambda shared, x, micro: (x.sum(), ()),
        )


def measure(schedule, seconds: float) -> dict:
    """The second step beside the simulator's."""
    sleeper = Sleeper(0, schedule.n_ranks)
    mesh = Mesh(np.array(jax.devices()[: schedule.n_ranks]), ("pipe",))
    table = place(schedule)
    step = jax.jit(lambda *args: gradients(table, mesh, sleeper.parts(), *args).loss)
    arguments = jnp.zeros(schedule.n_stages), (), jnp.zeros((schedule.n_microbatches, 1))
    jax.block_until_ready(step(*arguments))
    sleeper.records.clear()
    sleeper.seconds = seconds
    jax.block_until_ready(step(*arguments))
    return beside_the_simulator(_spans(sleeper.records, schedule), schedule)


def _spans(records, schedule):
    """[rank][cell]: start and end; a whole backward sleeps twice."""
    spans = []
    for rank, cells in enumerate(schedule.cells):
        mine = iter(sorted((start, end) for at, _, start, end in records if at == rank))
        spans.append([])
        for cell in cells:
            sleeps = [next(mine) for op in cell for _ in range(1 + (op.kind == "B"))]
            spans[-1].append((sleeps[0][0], sleeps[-1][1]))
        assert next(mine, None) is None, f"rank {rank} slept more often than F, I and W of all its cells"
    return spans


def compile_seconds(name: str, n_ranks: int, n_micro: int) -> float:
    """Of the step, from Python to machine code."""
    schedule = build(name, n_ranks, n_micro)
    mesh = Mesh(np.array(jax.devices()[:n_ranks]), ("pipe",))
    table, parts = place(schedule), Sleeper(0, n_ranks).parts()
    start = time.process_time()
    arguments = jnp.zeros(schedule.n_stages), (), jnp.zeros((n_micro, 1))
    jax.jit(lambda *args: gradients(table, mesh, parts, *args).loss).lower(*arguments).compile()
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit", type=float, default=0.5, help="seconds of F, I and W on a rank's layers")
    parser.add_argument("--schedules", default=",".join(NAMES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict = {"ranks": arguments.ranks, "microbatches": arguments.microbatches, "bubble": {}}
    print(f"{'':12}" + "".join(f"{word:>10}" for word in ("measured", "in step", "ratio", "units", "free")))
    for name in arguments.schedules.split(","):
        try:
            schedule = build(name, arguments.ranks, arguments.microbatches)
        except ScheduleError as error:
            print(f"{name:12}{error}")
            continue
        found = measure(schedule, arguments.unit * arguments.ranks / schedule.n_stages)
        found |= {"units": simulate_in_step(place(schedule), UNITS).bubble_fraction}
        found |= {"free": simulate(schedule, UNITS).bubble_fraction}
        results["bubble"][name] = found
        measured, in_step = found["measured"]["idle"], found["in_step"]["idle"]
        row = measured, in_step, measured / in_step, found["units"], found["free"]
        print(f"{name:12}" + "".join(f"{share:>10.4f}" for share in row), flush=True)
    print("\ncompile time of DualPipe on 4 ranks, CPU seconds by micro-batches:")
    results["compile"] = {}
    for count in (8, 16, 64, 256):
        results["compile"][count] = compile_seconds("dualpipe", 4, count)
        print(f"{count:>6}{results['compile'][count]:>8.2f}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

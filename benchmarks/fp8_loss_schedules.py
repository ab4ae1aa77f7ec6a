"""The first learning-rate schedule at which bf16 repeats its own loss: there a gap of FP8's can be measured.

    PYTHONPATH=. python benchmarks/fp8_loss_schedules.py [--config=configs/proxy_300m.py] [--seconds 500]
        [--schedules 6e-4:200,6e-5:2000] [--out results.json] [--plot gaps.png]
        [--config.FIELD=VALUE ...]

A schedule is its peak and the steps of its warm-up; the rest is the configuration's. At each, from the
highest, `bf16` and `again` of `fp8_loss.py` train from one state, each on its own device if there are two. A
schedule is given up as soon as their smoothed losses part by more than `CLAIM`; the first that holds for
`train.steps` steps ends the search. FP8 is not looked at. Results are written after every chunk of steps,
for `fp8_loss.py --add`: they hold both runs at the schedule that held, or else at that which held longest.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks import fp8_loss
from benchmarks.fp8_loss_curves import CLAIM, WINDOW, gap, smoothed

PAIR = ("bf16", "again")
CHUNK = 50  # Steps between two looks at the gap.
ROOM = 1.25  # Whole runs: with less time left than that, the last schedule is all that is still tried.
# The proxy's own, DeepSeek-V3's warm-up (section 4.2: 2,000 steps to 2.2e-4), and slower ones.
SCHEDULES = ("6e-4:200", "2.2e-4:2000", "6e-5:2000", "3e-5:2000")
Rows = list[list[float]]  # Of each step: loss, MaxVio, norm of the gradients.


def gaps(runs: dict[str, Rows]) -> np.ndarray:
    """Percent by which `again` is above `bf16`, of each whole window."""
    bf16, again = (smoothed([row[0] for row in runs[name]]) for name in PAIR)
    return gap(again, bf16)


def given_up(runs: dict[str, Rows]) -> int | None:
    """The last step of the first window whose gap is beyond `CLAIM` or no number; None if there is none."""
    beyond = np.flatnonzero(~(abs(gaps(runs)) <= CLAIM))
    return int(beyond[0]) + WINDOW if len(beyond) else None


def attempt(train: Callable[[int], dict[str, Rows]], steps: int, left: Callable[[], float], report) -> dict:
    """Trains by `train(steps)`, chunk by chunk, until step `steps`, the time or a gap ends it."""
    runs: dict[str, Rows] = {name: [] for name in PAIR}
    found: dict = {"runs": runs, "steps": 0, "given_up": None, "held": False, "seconds": 0.0}
    started = time.monotonic()
    while not found["held"] and found["given_up"] is None and left() > 0:
        for name, rows in train(min(CHUNK, steps - found["steps"])).items():
            runs[name].extend(rows)
        found["steps"] = min(map(len, runs.values()))
        found["given_up"] = given_up(runs)
        found["held"] = found["steps"] >= steps and found["given_up"] is None
        found["seconds"] = time.monotonic() - started
        found["largest_gap"] = float(max(abs(gaps(runs)), default=math.nan))
        report(found)
    return found


def search(
    schedules: list[str], begin: Callable, steps: int, left: Callable[[], float], report: Callable
) -> list[dict]:
    """Attempts the schedules in turn until one holds, or the time is over.

    Args:
      schedules: "PEAK:WARMUP", from the highest.
      begin: `begin(schedule)` is a function that trains so many steps more of both runs, from the same state.
      steps: for how many a schedule must hold.
      left: seconds left.
      report: is given all attempts after every chunk.

    Returns:
      What was found at each schedule that was attempted.
    """
    attempts: list[dict] = []
    waiting = list(schedules)
    while waiting and left() > 0:
        whole = steps * min((each["seconds"] / each["steps"] for each in attempts), default=0.0)
        if left() < ROOM * whole:
            del waiting[:-1]
        schedule = waiting.pop(0)

        def keep(found, schedule=schedule):
            report([*attempts, {"schedule": schedule} | found])

        attempts.append({"schedule": schedule} | attempt(begin(schedule), steps, left, keep))
        if attempts[-1]["held"]:
            break
    return attempts


def chosen(attempts: list[dict]) -> dict:
    """The attempt that held, or else the one that was within `CLAIM` for most steps."""
    return max(attempts, key=lambda each: (each["held"], each["given_up"] or each["steps"]))


def show(attempts: list[dict]) -> None:
    """A line on the chunk just trained."""
    found = attempts[-1]
    rows = np.array([found["runs"][name][-CHUNK:] for name in PAIR])
    last, outcome = [math.nan, *gaps(found["runs"])][-1], "held" if found["held"] else ""
    (norm, norm_again), (vio, vio_again) = rows[:, :, 2].max(1), rows[:, -1, 1]
    print(
        f"{found['schedule']} step {found['steps']}: loss {rows[0, :, 0].mean():.3f} gap {last:+.3f}% largest"
        f" {found['largest_gap']:.3f}% norm {norm:.2f} {norm_again:.2f} MaxVio {vio:.1f} {vio_again:.1f}"
        f" {found['seconds']:.0f} s {outcome or (found['given_up'] and 'given up') or ''}",
        flush=True,
    )


def plot(attempts: list[dict], path: str) -> None:
    """The gap of the second bf16 run to the first at every schedule attempted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for found in attempts:
        curve = gaps(found["runs"])
        axes.plot(np.arange(len(curve)) + WINDOW, curve, label=found["schedule"])
    axes.axhspan(-CLAIM, CLAIM, alpha=0.15)
    axes.set_ylabel("gap between two bf16 runs, %")
    axes.set_xlabel(f"step (means over {WINDOW})")
    axes.legend(title="peak rate : warm-up")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def runners(configs: dict, schedules: dict, text: fp8_loss.Text) -> Callable:
    """`begin` of `search`, with one compilation for all schedules: the learning rate is an input of the step.

    Args:
      configs: of each of `PAIR`, as it is compiled.
      schedules: by name, configurations that differ in the schedule only.
      text: the batches.
    """
    import jax

    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training.state import init_state

    devices = jax.devices()
    meshes = {n: make_mesh(configs[n].mesh, [devices[i % len(devices)]]) for i, n in enumerate(PAIR)}
    threads = ThreadPoolExecutor(len(PAIR))

    def compiled(name):
        return fp8_loss.compiled(name, configs[name], meshes[name], text)

    programs = dict(zip(PAIR, threads.map(compiled, PAIR), strict=True))
    start = init_state(configs[PAIR[0]], meshes[PAIR[0]])

    def begin(schedule):
        states = {name: fp8_loss.copied(start, configs[name], meshes[name]) for name in PAIR}
        done = dict.fromkeys(PAIR, 0)
        config = schedules[schedule]

        def chunk(name, steps):
            def inputs(step):
                return text.inputs(config, meshes[name], step)

            with jax.default_device(meshes[name].devices.flat[0]):
                program, state, first = programs[name], states[name], done[name]
                states[name], run = fp8_loss.train(
                    config, program, state, inputs, first, steps, math.inf, dict
                )
            done[name] += steps
            return run["losses"]

        return lambda steps: dict(zip(PAIR, threads.map(lambda name: chunk(name, steps), PAIR), strict=True))

    return begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/proxy_300m.py")
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--out", default="benchmarks/results/fp8_loss_schedules.json")
    parser.add_argument("--plot", default="")
    arguments, overrides = parser.parse_known_args()
    deadline = time.monotonic() + arguments.seconds

    import train as trainer

    def parse(*fields):
        flags = (f"--config.{field}" for field in fields)
        return trainer.parse([f"--config={arguments.config}", *overrides, *flags])[0]

    names = arguments.schedules.split(",")
    schedules = {}
    for name in names:
        peak, _, warmup = name.partition(":")
        schedules[name] = parse(f"optimizer.peak_lr={peak}", f"optimizer.warmup_steps={warmup}")
    configs = {name: parse(*fp8_loss.VARIANTS[name]) for name in PAIR}
    text = fp8_loss.Text(configs[PAIR[0]])
    about = fp8_loss.described(arguments.config, overrides, text)
    about |= {"window": WINDOW, "claim": CLAIM, "schedules": names}
    tokens = configs[PAIR[0]].train.batch_size * configs[PAIR[0]].train.seq_len

    def report(attempts):
        best = chosen(attempts)
        shared = {"tokens_a_step": tokens, "first": 0, "seconds": best["seconds"]}
        found = {
            "attempts": attempts,
            "chosen": best["schedule"],
            "held": best["held"],
            "runs": {name: shared | {"losses": rows} for name, rows in best["runs"].items()},
        }
        Path(arguments.out).write_text(json.dumps(about | found) + "\n")
        show(attempts)

    begin = runners(configs, schedules, text)
    steps = configs[PAIR[0]].train.steps
    attempts = search(names, begin, steps, lambda: deadline - time.monotonic(), report)
    for found in attempts:
        print(json.dumps({key: value for key, value in found.items() if key != "runs"}))
    if arguments.plot:
        plot(attempts, arguments.plot)


if __name__ == "__main__":
    main()

"""The loss of training in FP8 beside bf16, from the same parameters and on the same text.

    PYTHONPATH=. python benchmarks/fp8_loss.py [--config=configs/proxy_300m.py] [--seconds 500]
        [--variants bf16,fp8,coarse:500,again:800,tensor:400] [--shared 1000] [--out results.json]
        [--plot loss.png] [--config.FIELD=VALUE ...]

`tensor` is a control, one scale a tensor; `coarse` another, whose sums are left to the tensor cores besides.
`again` is bf16 with another attention kernel, which adds in another order: how far two bf16 runs drift apart
is the noise of the gap. The variants take turns on the devices that there are: on one they run one after
another, on four each has its own; those with a number of steps share what the others of their device leave
of the seconds. Results are written as they come. The gap is that of the losses smoothed over `WINDOW` steps,
relative to bf16. `--add FILE` takes the variants that are not run from earlier results.

With `--shared N` the first N steps are bf16's, on all devices together, and the variants part there: a run
from nothing goes through transitions, as when attention learns to copy, whose moment differs from one bf16
run to the next.
"""

import argparse
import functools
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.fp8_loss_curves import SHARED, compare, plot

VARIANTS = {
    "bf16": ["train.precision=bf16"],
    "fp8": ["train.precision=fp8"],
    "again": ["train.precision=bf16", "model.attention.implementation=cudnn"],
    "tensor": [
        "train.precision=fp8",
        "fp8.activation_scales=tensor",
        "fp8.weight_scales=tensor",
    ],
    "coarse": [
        "train.precision=fp8",
        "fp8.activation_scales=tensor",
        "fp8.weight_scales=tensor",
        "fp8.promotion=False",
    ],
}
AHEAD = 20  # Steps that the host may be ahead of the device.
SAVED = 200  # Steps between writings of the results.


class Text:
    """The rows of every step, made while the programs compile."""

    def __init__(self, config):
        from dsv3_jax.data import Loader

        train = config.train
        self._rows = []
        process = dict(process_index=0, process_count=1)
        loader = Loader(config.data, split="train", seq_len=train.seq_len, seed=train.seed, **process)
        self.source = loader.get_state()["data"]["data.source"]
        self.passes = train.steps * train.batch_size / loader.per_pass

        def read():
            self._rows.append(first)
            self._rows.extend(loader.take(train.batch_size) for _ in range(1, train.steps))
            loader.close()

        first = loader.take(train.batch_size)
        self._reader = ThreadPoolExecutor(1).submit(read)

    def inputs(self, config, mesh, step: int):
        """The batch, its number of micro-batches and `config`'s schedules of a step, on `mesh`."""
        from dsv3_jax.training import loop

        while len(self._rows) <= step:
            if self._reader.done():
                self._reader.result()  # Raises what went wrong.
            time.sleep(0.01)
        train = config.train
        batch, count = loop.put_batch(config, mesh, self._rows[step], train.batch_size)
        schedules = loop.schedules_at(config, step, step * train.batch_size * train.seq_len)
        return batch, count, schedules


def compiled(name: str, config, mesh, text: Text):
    """The training step of a variant."""
    import jax

    from dsv3_jax.training.state import abstract_state
    from dsv3_jax.training.step import make_train_step

    started = time.monotonic()
    step: Any = make_train_step(config, mesh)
    with jax.default_device(mesh.devices.flat[0]):
        program = step.lower(abstract_state(config, mesh), *text.inputs(config, mesh, 0)).compile()
    print(f"{name}: compiled in {time.monotonic() - started:.0f} s", flush=True)
    return program


def copied(start, config, mesh):
    """`start` on another mesh: a copy, since a step overwrites what it is given."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.training.state import abstract_state, shardings

    return jax.device_put(jax.tree.map(jnp.copy, start), shardings(abstract_state(config, mesh)))


def train(config, program, state, inputs, first: int, steps: int, deadline: float, save):
    """Trains `steps` steps from step `first`, or until the time is over; saves now and then.

    Returns the state, and what `save` returned.
    """
    metrics, rows = [], []
    run: dict[str, Any] = {"tokens_a_step": config.train.batch_size * config.train.seq_len, "first": first}

    def collect():
        rows.extend([float(x) for x in row] for row in metrics[len(rows) :])
        run.update(losses=rows, seconds=time.monotonic() - started)
        return save(run)

    started = time.monotonic()
    for step in range(first, min(first + steps, config.train.steps)):
        state, found = program(state, *inputs(step))
        metrics.append((found.losses.ce_loss, found.max_vio.mean(), found.grad_norm))
        if len(metrics) > AHEAD:
            metrics[-AHEAD][0].block_until_ready()
        if time.monotonic() > deadline:
            break
        if len(metrics) % SAVED == 0:
            collect()
    return state, collect()


def described(config: str, overrides: list[str], text: Text) -> dict[str, Any]:
    """What results say of the run that they are of."""
    from benchmarks import timing

    return {
        "config": config,
        "overrides": overrides,
        "versions": timing.versions(),
        "text": text.source,
        "passes_over_the_text": text.passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/proxy_300m.py")
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--add", default="")
    parser.add_argument("--out", default="benchmarks/results/fp8_loss.json")
    parser.add_argument("--plot", default="")
    arguments, overrides = parser.parse_known_args()
    deadline = time.monotonic() + arguments.seconds

    import train as trainer

    configs, limits = {}, {}
    for variant in arguments.variants.split(","):
        name, _, steps = variant.partition(":")
        if steps:
            limits[name] = int(steps)
        fields = [f"--config.{field}" for field in VARIANTS[name]]
        configs[name], _ = trainer.parse([f"--config={arguments.config}", *overrides, *fields])
    text = Text(next(iter(configs.values())))
    runs = json.loads(Path(arguments.add).read_text())["runs"] if arguments.add else {}
    about = described(arguments.config, overrides, text) | {"shared": arguments.shared}
    lock = threading.Lock()

    def save(name, run):
        with lock:
            runs[name] = run | {"losses": list(run["losses"])}
            summary = compare(runs)
            Path(arguments.out).write_text(json.dumps(about | {"summary": summary, "runs": runs}) + "\n")
        return summary.get(name)

    if arguments.shared:
        together = ["--config.mesh.data=-1", *(f"--config.{field}" for field in VARIANTS["bf16"])]
        start, _ = trainer.parse([f"--config={arguments.config}", *overrides, *together])
        configs = {SHARED: start, **configs}
    run_all(configs, limits, text, arguments.shared, deadline, save)
    if arguments.plot:
        plot(runs, arguments.plot)


def run_all(configs: dict, limits: dict, text: Text, shared: int, deadline: float, save) -> None:
    """Trains every variant from one state: that of configuration `SHARED` after `shared` steps, if any."""
    import jax

    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training.state import init_state

    devices = jax.devices()
    names = [name for name in configs if name != SHARED]
    meshes = {
        name: make_mesh(configs[name].mesh, [devices[i % len(devices)]]) for i, name in enumerate(names)
    }
    if shared:
        meshes[SHARED] = make_mesh(configs[SHARED].mesh, devices)

    def inputs(name):
        return lambda step: text.inputs(configs[name], meshes[name], step)

    def compile_in_time(name):
        return compiled(name, configs[name], meshes[name], text) if time.monotonic() < deadline else None

    def turn(names, start):
        """The variants of one device, one after another."""
        for index, name in enumerate(names):
            program, left = programs[name].result(), deadline - time.monotonic()
            if program is None or left <= 0:
                continue
            config, mesh = configs[name], meshes[name]
            steps, until = config.train.steps, deadline
            if name in limits:  # The others after it get as much of what is left.
                steps, until = limits[name], time.monotonic() + left / (len(names) - index)
            with jax.default_device(mesh.devices.flat[0]):
                state = copied(start, config, mesh)
                keep = functools.partial(save, name)
                _, found = train(config, program, state, inputs(name), shared, steps, until, keep)
            print(name, json.dumps(found), flush=True)

    with ThreadPoolExecutor(1 + len(devices)) as compiling, ThreadPoolExecutor(len(devices)) as running:
        programs = {name: compiling.submit(compile_in_time, name) for name in configs}
        first = next(iter(configs))  # The shared start, if there is one.
        start = init_state(configs[first], meshes[first])
        if shared and (program := programs[first].result()) is not None:
            until = 0, shared, deadline, functools.partial(save, SHARED)
            start, _ = train(configs[first], program, start, inputs(first), *until)
        queues = [names[i :: len(devices)] for i in range(len(devices))]
        for job in [running.submit(turn, queue, start) for queue in queues]:
            job.result()


if __name__ == "__main__":
    main()

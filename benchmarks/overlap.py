"""What travels beside what in training: state in host memory, and tokens beside the shared experts.

    PYTHONPATH=. python benchmarks/overlap.py [--layers 6] [--steps 6] [--cases NAME;NAME] [--out FILE]

Cases are processes of their own. They train `configs/small_gpu.py`, cut to `--layers`, on real text, and
profile two steps:

    device                     everything in device memory
    moments                    the optimizer's moments in host memory
    moments, experts'          those of the routed experts, 89%, in host memory
    moments, gate and up       those of the experts' first matrices, 59%
    average on the device      a moving average of the parameters, in device memory
    average                    the same in host memory
    both                       moments and average in host memory
    both, CUDA graphs          the same as `train.py` runs it: the profile names fewer instructions
    one GPU, whole batch       what expert-parallel is compared with
    expert-parallel            two GPUs
    ..., constant latencies    the same, scheduled without XLA's model of how long collectives take
    ..., average               the same with an average in host memory
    ..., average on the device the same with it in device memory
    data-parallel, ...         both, with the optimizer's state divided (ZeRO-1)

Checked first: losses beside those of `device`, bit by bit; one program that updates moments here and there;
the average beside its recurrence in float64, and where the step updates it, bit by bit beside one that a
program of its own updates after every step; the losses of expert- and data-parallel beside one GPU's, or
beside those of the same with the average on the device.

Where there are four GPUs, what copies to the host runs on the first, what does not on the second, and
expert-parallel on the last two, at the same time. CUDA graphs are off in all other cases: so the profile
names instructions.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.overlap_profile import PROFILED, beside_copies, beside_exchanges, schedule  # noqa: E402
from benchmarks.profile_events import events  # noqa: E402

FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true"
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
CONSTANT = "--xla_gpu_enable_analytical_sol_latency_estimator=false"
DECAY = 0.99
AVERAGE = f"--config.train.ema_decay={DECAY}"
BOTH = [AVERAGE, "--config.optimizer.memory=host", "--config.train.ema_memory=host"]
WHOLE = "--config.train.batch_size=16"
SPREAD = [WHOLE, "--config.mesh.expert=2", "--config.mesh.sharding=zero1"]
DATA = [WHOLE, "--config.mesh.data=2", "--config.mesh.sharding=zero1"]
HOST_AVERAGE = [AVERAGE, "--config.train.ema_memory=host"]
# Of four GPUs those that it runs on, and overrides of the configuration.
CASES: dict[str, tuple[tuple[int, ...], list[str]]] = {
    "moments": ((0,), ["--config.optimizer.memory=host"]),
    "moments, experts'": ((0,), ["--config.optimizer.memory=host", "--config.optimizer.host_share=0.88"]),
    "moments, gate and up": ((0,), ["--config.optimizer.memory=host", "--config.optimizer.host_share=0.59"]),
    "average": ((0,), HOST_AVERAGE),
    "both": ((0,), BOTH),
    "both, CUDA graphs": ((0,), BOTH),
    "device": ((1,), []),
    "average on the device": ((1,), [AVERAGE]),
    "one GPU, whole batch": ((1,), [WHOLE]),
    "expert-parallel": ((2, 3), SPREAD),
    "expert-parallel, constant latencies": ((2, 3), SPREAD),
    "expert-parallel, average on the device": ((2, 3), [*SPREAD, AVERAGE]),
    "expert-parallel, average": ((2, 3), [*SPREAD, *HOST_AVERAGE]),
    "data-parallel, average on the device": ((2, 3), [*DATA, AVERAGE]),
    "data-parallel, average": ((2, 3), [*DATA, *HOST_AVERAGE]),
}
WARM = 3  # Steps before those that are timed; the average is checked after them.


# ---------------------------------------------------------------- one case


def measure(argv: list[str], steps: int, ready: Callable[[], None] = lambda: None) -> dict:
    """One case, in this process; `ready` is called when it has compiled, and returns when it may run."""
    import train as trainer

    config, _ = trainer.parse(argv)
    import jax
    import numpy as np

    from dsv3_jax.data import Loader
    from dsv3_jax.parallel.mesh import make_mesh, replicated
    from dsv3_jax.training import ema, ema_beside, loop
    from dsv3_jax.training.state import abstract_state, init_state, shardings
    from dsv3_jax.training.step import make_train_step

    mesh, sequences, seq_len = make_mesh(config.mesh), config.train.batch_size, config.train.seq_len
    process = dict(process_index=0, process_count=1)
    loader = Loader(config.data, split="train", seq_len=seq_len, seed=config.train.seed, **process)

    def inputs(step):
        batch, count = loop.put_batch(config, mesh, loader.take(sequences), sequences)
        return batch, count, loop.schedules_at(config, step, step * sequences * seq_len)

    abstract = abstract_state(config, mesh)
    layout = ema.shardings(shardings(abstract.params), config.train.ema_memory)
    started = time.perf_counter()
    finite = jax.ShapeDtypeStruct((), bool, sharding=replicated(mesh))
    beside = ema_beside.applies(config, mesh)
    divided = ema_beside.abstract_average(abstract.params, layout)
    jitted: Any = make_train_step(config, mesh, average=beside)
    step_function = jitted.lower(abstract, *inputs(0), *([divided, finite] if beside else [])).compile()
    text, update = step_function.as_text(), None
    average: Any = None
    keeper = ema_beside.Keeper(abstract.params, layout)
    if config.train.ema_decay:
        jitted = ema.make_update(DECAY, layout)
        update = jitted.lower(divided.params, abstract.params, finite).compile()
        text += update.as_text()
    row: dict = {"compile_seconds": time.perf_counter() - started, "mesh": dict(mesh.shape)}
    ready()
    row |= {"jax": jax.__version__, "gpu": jax.devices()[0].device_kind}
    state = init_state(config, mesh)
    if update:
        average = ema.init(state.params, layout)
    losses, expected, other = [], None, None
    metrics: Any = None
    changed: Any = jax.device_put(False, replicated(mesh))

    def run(count):
        nonlocal state, average, metrics, changed
        for _ in range(count):
            given = state, *inputs(len(losses))
            if beside:
                state, metrics, average = step_function(*given, average, changed)
                changed = metrics.finite
            else:
                state, metrics = step_function(*given)
                if update:
                    average = update(average, state.params, metrics.finite)
            losses.append(metrics.losses.ce_loss)
        jax.block_until_ready((state, average, metrics))

    if update:
        expected = watched(state.params)
    if update and beside:
        other, average = ema.init(state.params, layout), keeper.apart(average)
    for _ in range(WARM):
        run(1)
        if update and beside:
            other = update(other, state.params, metrics.finite)
        if expected is not None:
            now = watched(state.params)
            expected = [DECAY * old + (1 - DECAY) * new for old, new in zip(expected, now, strict=True)]
    if update and beside:
        average = update(keeper.whole(average), state.params, changed)
        row["unequal_averages"] = unequal(average, other, shardings(abstract.params))
        other = None
    if expected is not None:
        on_device = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        there = watched(jax.tree.map(jax.device_put, average, on_device))
        apart = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(there, expected, strict=True)]
        row["average_beside_float64"] = float(max(apart))
    if beside:
        average, changed = keeper.apart(average), jax.device_put(False, replicated(mesh))
    if config.optimizer.memory == "host":
        row["unequal_updates"] = unequal_updates(mesh, config)
    started = time.perf_counter()
    run(steps)
    speed = steps * sequences * seq_len / (time.perf_counter() - started)
    row |= {
        "tokens_per_second": speed,
        "step_ms": 1e3 * sequences * seq_len / speed,
        "peak_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "state_gb": {
            "moments": 2 * _bytes(abstract.optimizer.mu) / 1e9,
            "average": _bytes(abstract.params) / 1e9 if config.train.ema_decay else 0,
        },
        "losses": [float(loss) for loss in losses],
        "finite": bool(metrics.finite),
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(PROFILED)
        found = events(folder)
    try:
        if beside and mesh.size > 1:
            devices = sorted({event.device for event in found})
            by_device = ([event for event in found if event.device == device] for device in devices)
            row["profile"] = {
                d: beside_copies(mine, text) for d, mine in zip(devices, by_device, strict=True)
            }
        else:
            row["profile"] = beside_exchanges(found, text) if mesh.size > 1 else beside_copies(found, text)
    except Exception:
        row["profile"] = {"error": traceback.format_exc()[-800:], "events": len(found)}
    if mesh.shape["expert"] > 1:
        row["schedule"] = schedule(text)
    return row


def _bytes(tree) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def unequal(first, second, on_device) -> int:
    """Elements that differ between two trees in host memory."""
    import jax

    count = jax.jit(lambda x, y: (x != y).sum(dtype="float32"))
    pairs = zip(*map(jax.tree.leaves, (first, second, on_device)), strict=True)
    return int(sum(float(count(jax.device_put(x, place), jax.device_put(y, place))) for x, y, place in pairs))


def watched(params) -> list:
    """A few parameters in float64: a norm's scale, and a row of the last layer's last expert."""
    import numpy as np

    some = params["final_norm"]["scale"], params["moe_layers"]["moe"]["gate_up"][-1, -1, -1]
    return [np.asarray(x, np.float64) for x in some]


def unequal_updates(mesh, config) -> dict:
    """Three updates of random parameters: elements that differ with moments in host memory."""
    import dataclasses

    import jax
    import numpy as np

    from dsv3_jax.parallel.mesh import replicated
    from dsv3_jax.training import optimizer

    rng = np.random.default_rng(0)
    shapes = {"moe_layers": {"a": (5, 300, 70), "b": (5, 64)}, "embedding": (512, 96), "scale": (96,)}

    def random():
        sizes = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
        leaves = [rng.standard_normal(size).astype(np.float32) for size in sizes]
        return jax.tree.unflatten(jax.tree.structure(shapes, is_leaf=lambda x: isinstance(x, tuple)), leaves)

    start, gradients = random(), [random() for _ in range(3)]
    here = replicated(mesh)

    def updated(memory):
        settings = dataclasses.replace(config.optimizer, memory=memory)
        moments = optimizer.init(start, settings)
        away = optimizer.in_host_memory(start, settings)
        place = jax.tree.map(lambda away: here.with_memory_kind("pinned_host") if away else here, away)
        place = moments._replace(count=here, mu=place, nu=place)
        layout = jax.tree.map(lambda _: here, start), place

        def update(params, moments, grads):
            return optimizer.adamw_update(params, grads, moments, 1e-3, 0.7, settings)

        call: Any = jax.jit(update, out_shardings=layout, donate_argnums=(0, 1))
        state = jax.device_put((start, moments), layout)
        for grads in gradients:
            state = call(*state, grads)
        return jax.tree.leaves(jax.device_get(jax.device_put(state, here)))

    results = updated("device"), updated("host")
    pairs = [(np.float32(x), np.float32(y)) for x, y in zip(*results, strict=True)]
    return {
        "elements": sum(x.size for x, _ in pairs),
        "unequal": int(sum((x != y).sum() for x, y in pairs)),
        "largest difference": float(max(np.abs(x - y).max() for x, y in pairs)),
    }


# ---------------------------------------------------------------- all cases


def beside_whom(name: str) -> str | None:
    """The case whose losses those of another are compared with."""
    if name in ("device", "one GPU, whole batch"):
        return None
    if name.endswith("-parallel, average"):
        return f"{name} on the device"
    return "one GPU, whole batch" if "-parallel" in name else "device"


def verdicts(rows: dict) -> dict:
    """What was checked of each case."""
    found = {}
    for name, row in rows.items():
        if "losses" not in row:
            continue
        mine: dict = {"finite": row["finite"]}
        other = rows.get(beside_whom(name) or "", {})
        if "losses" in other:
            pairs = list(zip(row["losses"], other["losses"], strict=False))
            mine["losses"] = len(pairs)
            mine["equal losses"] = sum(x == y for x, y in pairs)
            mine["largest difference of the first three"] = max(abs(x - y) / y for x, y in pairs[:3])
        # Averages round to float32 three times; bf16 products in another order moved a loss by 4e-5.
        mine["ok"] = (
            row["finite"]
            and row.get("average_beside_float64", 0) < 1e-6
            and row.get("unequal_averages", 0) == 0
            and row.get("unequal_updates", {"largest difference": 0})["largest difference"] < 1e-6
            and mine.get("largest difference of the first three", 0) < 1e-3
        )
        found[name] = mine
    return found


def start(name: str, gpus: tuple[int, ...], steps: int, layers: int, folder: Path) -> subprocess.Popen:
    """`measure` in a process of its own, which writes to files of the case's name in the folder."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    flags = FLAGS if "CUDA graphs" in name else f"{FLAGS} {NO_GRAPHS}"
    if "constant" in name:
        flags += f" {CONSTANT}"
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # All compile at once.
    # The client's own limit on pinned memory is 64 GB.
    environment.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "110")
    argv = ["--config=configs/small_gpu.py", f"--config.model.n_layers={layers}"]
    argv += ["--config.model.moe.bias_speed=0.02", *CASES[name][1]]
    command = [sys.executable, __file__, f"--child={folder / name}.json", f"--steps={steps}", *argv]
    with open(folder / f"{name}.log", "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="that are timed")
    parser.add_argument("--seconds", type=float, default=600, help="the longest that all may take")
    parser.add_argument("--cases", default=";".join(CASES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overlap.json"))
    parser.add_argument("--after", type=Path, help="a file: before it exists no case runs on several GPUs")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments, configuration = parser.parse_known_args()
    if arguments.child:

        def ready():
            arguments.child.with_suffix(".compiled").touch()
            while not arguments.child.with_suffix(".go").exists():
                time.sleep(0.1)

        row = measure(configuration, arguments.steps, ready)
        part = arguments.child.with_suffix(".part")
        part.write_text(json.dumps(row))
        part.rename(arguments.child)
        sys.stdout.flush()
        os._exit(0)  # Freeing pinned memory takes seconds.

    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    count = len(listed.stdout.strip().splitlines())
    wanted = arguments.cases.split(";")
    gpus_of = {name: CASES[name][0] if count >= 4 else tuple(range(len(CASES[name][0]))) for name in wanted}
    rows: dict[str, dict] = {}
    began, running = time.time(), set()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        waiting = {
            name: start(name, gpus, arguments.steps, arguments.layers, folder)
            for name, gpus in gpus_of.items()
        }
        while waiting:
            time.sleep(0.5)
            if time.time() - began > arguments.seconds:
                for child in waiting.values():
                    child.kill()
            # They compile side by side, and run when all have, in order, alone on their GPUs.
            running &= waiting.keys()
            if all((folder / f"{name}.compiled").exists() for name in waiting):
                for name in waiting:
                    late = arguments.after and len(gpus_of[name]) > 1 and not arguments.after.exists()
                    busy = {gpu for other in running for gpu in gpus_of[other]}
                    if name not in running and not late and not busy & set(gpus_of[name]):
                        (folder / f"{name}.go").touch()
                        running.add(name)
            for name in [name for name, child in waiting.items() if child.poll() is not None]:
                code, result = waiting.pop(name).returncode, folder / f"{name}.json"
                row = {"failed": code, "output": (folder / f"{name}.log").read_text()[-2500:]}
                if result.exists():
                    row = json.loads(result.read_text())
                rows[name] = row | {"gpus": gpus_of[name]}
                settings = {"layers": arguments.layers, "flags": FLAGS}
                content = settings | {"checks": verdicts(rows), "cases": rows}
                arguments.out.write_text(json.dumps(content, indent=1) + "\n")
                print(f"{time.time() - began:.0f} s: {name}: {json.dumps(rows[name])[:6000]}", flush=True)
    checks = verdicts(rows)
    print(json.dumps(checks, indent=1))
    for name, row in rows.items():
        if "ms_a_step" in row.get("profile", {}):
            print(f"{name:24} {row['tokens_per_second']:>8.0f} tokens/s {row['peak_gib']:>6.1f} GiB", end=" ")
            print(*(f"{what} {ms:.0f};" for what, ms in row["profile"]["ms_a_step"].items()))
    return 0 if len(checks) == len(wanted) and all(check["ok"] for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

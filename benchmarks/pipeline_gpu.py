"""Training through a pipeline on two devices beside data and expert parallelism: tokens/s, memory, overlap.

    python benchmarks/pipeline_gpu.py [--config=configs/small_gpu.py] [--out FILE] [--config.FIELD=VALUE ...]

The configuration's model, cut to layers that both stages share evenly, with random weights and tokens. Every
variant trains on the same tokens a step:

    data          two replicas, the micro-batches one after the other
    1f1b, zb1p, dualpipe   two stages on two devices
    expert        experts on two devices, no pipeline
    overlap       the same, and DualPipeV on one rank: forward of one micro-batch beside backward of another

Memory is the allocator's peak and XLA's assignment for the step, beside a count of what the schedule says a
rank holds. `expert`
and `overlap` are profiled: how much of the time of collectives lies under computation, and which
instructions the compiler put between the start and the end of each all-to-all.
"""

import argparse
import dataclasses
import fcntl
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)

VARIANTS = {  # Pipeline, (pipe, data, expert).
    "data": ("", (1, 2, 1)),
    "1f1b": ("1f1b", (2, 1, 1)),
    "dualpipe": ("dualpipe", (2, 1, 1)),
    "zb1p": ("zb1p", (2, 1, 1)),
    "expert": ("", (1, 1, 2)),
    "overlap": ("dualpipev", (1, 1, 2)),
}


def variant_of(config, name, n_micro, sequences):
    """The run of a variant: `n_micro * sequences` a step, `sequences` at once on a device."""
    pipeline, (pipe, data, expert) = VARIANTS[name]
    rows, micro = sequences * n_micro, sequences * data * expert
    mesh = dataclasses.replace(config.mesh, pipe=pipe, data=data, expert=expert)
    train = dataclasses.replace(config.train, pipeline=pipeline, batch_size=rows, micro_batch_size=micro)
    return dataclasses.replace(config, mesh=mesh, train=train)


def random_state(config, mesh):
    """Weights of the run's deviation, norms of one, moments of zero; cheap to compile."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.training.state import abstract_state, shardings

    abstract = abstract_state(config, mesh)

    def draw(path, leaf):
        where = jax.tree_util.keystr(path)
        if "scale" in where and "params" in where:
            return jnp.ones(leaf.shape, leaf.dtype)
        if "params" not in where:
            return jnp.zeros(leaf.shape, leaf.dtype)
        key = jax.random.key(len(where), impl="rbg")
        return config.model.init_std * jax.random.normal(key, leaf.shape, leaf.dtype)

    make = jax.jit(
        lambda: jax.tree_util.tree_map_with_path(draw, abstract), out_shardings=shardings(abstract)
    )
    return make()


def random_batch(config, mesh):
    import jax
    import numpy as np

    from dsv3_jax.training.step import batch_sharding

    train = config.train
    rng = np.random.default_rng(0)
    shape = train.batch_size, train.seq_len + 1
    tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(train.seq_len, dtype=np.int32), tokens[:, 1:].shape),
        "segment_ids": np.ones_like(tokens[:, 1:]),
        "loss_mask": np.ones(tokens[:, 1:].shape, bool),
    }
    cut = -1, train.micro_batch_size, train.seq_len
    return {name: jax.device_put(x.reshape(cut), batch_sharding(mesh)) for name, x in rows.items()}


def compiled(config, mesh):
    """The step, its rates, and the seconds of tracing and compiling."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.training.state import abstract_state
    from dsv3_jax.training.step import Schedules, batch_sharding, make_train_step

    train = config.train
    shape = train.batch_size // train.micro_batch_size, train.micro_batch_size, train.seq_len
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in (dtypes | {"loss_mask": jnp.bool_}).items()
    }
    rates = Schedules(*(jnp.float32(x) for x in (1e-4, 1e-3, 0.3)))
    start = time.perf_counter()
    step: Any = make_train_step(config, mesh)
    lowered = step.lower(abstract_state(config, mesh), batch, np.int32(shape[0]), rates)
    traced = time.perf_counter()
    return lowered.compile(), rates, {"trace": traced - start, "compile": time.perf_counter() - traced}


def counted_memory(config, mesh) -> dict[str, float]:
    """GiB that a rank holds by the schedule, without what one cell works with."""
    import jax

    from dsv3_jax.pipeline import build, place, simulator
    from dsv3_jax.training.state import abstract_state

    abstract = abstract_state(config, mesh)

    def local(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    train, model = config.train, config.model
    parts = {"state": local(abstract)}
    if not train.pipeline:
        parts["gradients"] = local(abstract.params)
    else:
        ranks = mesh.shape["pipe"]
        schedule = build(train.pipeline, ranks, train.batch_size // train.micro_batch_size)
        stacks = {name: leaf for name, leaf in abstract.params.items() if name.endswith("_layers")}
        rest = {name: leaf for name, leaf in abstract.params.items() if name not in stacks}
        stage = local(stacks) * ranks / schedule.n_stages
        held = max(simulator.parameters(schedule)) * stage + ranks * local(rest)
        parts["gradients"] = local(abstract.params)
        parts["stages"], parts["stage gradients"] = held, held
        width = 4 if train.precision == "fp32" else 2
        sequences = train.micro_batch_size // (mesh.shape["data"] * mesh.shape["expert"])
        slots = sum(max(sizes) + 1 for sizes in place(schedule).n_slots.values())
        parts["slots"] = slots * sequences * train.seq_len * model.d_model * width
    return {name: size / 2**30 for name, size in parts.items()}


def run(name, config, mesh, step, rates, steps) -> dict:
    import jax
    import numpy as np

    state, batch = random_state(config, mesh), random_batch(config, mesh)
    n_micro = np.int32(len(batch["tokens"]))
    times, metrics = [], cast(Any, None)
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch, n_micro, rates)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    counted = counted_memory(config, mesh)
    row = {
        "tokens_per_second": config.train.batch_size * config.train.seq_len / statistics.median(times[1:]),
        "step_seconds": times,
        "loss": float(metrics.losses.loss),
        "grad_norm": float(metrics.grad_norm),
        "assigned_gib": held / 2**30,
        "peak_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "counted_gib": counted | {"all": sum(counted.values())},
    }
    if name in ("expert", "overlap", "dualpipe"):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, metrics = step(state, batch, n_micro, rates)
                jax.block_until_ready(metrics)
            row["profile"] = guarded(lambda: overlap(folder))
        row["schedule"] = guarded(lambda: between(step.as_text()))
    return row


def guarded(function):
    """Its result, or what went wrong: a profile that cannot be read costs no measurement."""
    try:
        return function()
    except Exception:
        return {"error": traceback.format_exc()[-600:]}


def overlap(folder) -> dict:
    """Of every device: milliseconds of collectives, and how many of them lie under other kernels."""
    from jax.profiler import ProfileData

    found = {}
    for file in Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            collectives, others = [], []
            for line in plane.lines:
                if not line.name.lower().startswith("stream"):
                    continue
                for event in line.events:
                    span = event.start_ns, event.start_ns + event.duration_ns
                    (collectives if "nccl" in event.name.lower() else others).append(span)
            total = sum(end - start for start, end in merged(collectives))
            hidden = sum(shared(merged(collectives), merged(others)))
            found[plane.name] = {
                "collectives_ms": total / 1e6,
                "under_computation_ms": hidden / 1e6,
                "computation_ms": sum(end - start for start, end in merged(others)) / 1e6,
                "kernels": len(others),
                "collective_kernels": len(collectives),
            }
    return found


def merged(spans):
    """Spans without overlap, in order."""
    out = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out


def shared(first, second):
    """Lengths of what lies in both."""
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if end > start:
            yield end - start
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1


def between(text) -> list[dict]:
    """For each asynchronous all-to-all: its direction, and what the compiler put inside it."""
    pairs, open_starts = [], {}
    for line in text.splitlines():
        if re.match(r"^\S.*\{$", line):
            open_starts = {}
        match = re.match(r"\s+(?:ROOT )?%?(\S+) = (.*)", line)
        if not match:
            continue
        name, rest = match.groups()
        where = re.search(r'op_name="([^"]*)"', rest)
        path = where.group(1) if where else ""
        scope = "backward" if "backward" in path else "forward" if "forward" in path else "other"
        if re.search(r"(all-to-all|async)-start\(", rest) and "all-to-all" in name + rest:
            open_starts[name] = {"scope": scope, "inside": {"forward": 0, "backward": 0, "other": 0}}
            continue
        done = re.search(r"(?:all-to-all|async)-done\(.*?%?([\w.-]+)\)", rest)
        if done and done.group(1) in open_starts:
            pairs.append(open_starts.pop(done.group(1)))
        elif re.search(r" (fusion|custom-call|dot|while)\(", rest):
            for pair in open_starts.values():
                pair["inside"][scope] += 1
    return pairs


def measure(name, arguments, overrides) -> dict:
    """One variant, in a process of its own: it compiles beside the others, and runs alone."""
    import train as trainer

    fixed = {"model.n_layers": arguments.layers, "model.moe.n_dense_layers": 0, "train.remat": "'none'"}
    argv = [f"--config={arguments.config}", "--config.mesh.data=1"]
    config, _ = trainer.parse([*argv, *(f"--config.{k}={v}" for k, v in fixed.items()), *overrides])
    import jax

    from dsv3_jax.config_checks import check, check_machine
    from dsv3_jax.parallel.mesh import make_mesh

    config = variant_of(config, name, arguments.microbatches, arguments.sequences)
    if found := check(config) + check_machine(config, jax.device_count(), None):
        raise SystemExit(f"{name}: {found}")
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    with (
        open(arguments.locks / "compiling", "w") as compiling,
        open(arguments.locks / "running", "w") as running,
    ):
        fcntl.flock(compiling, fcntl.LOCK_SH)
        step, rates, seconds = compiled(config, mesh)
        fcntl.flock(compiling, fcntl.LOCK_UN)
        while time.time() < arguments.until and not free(compiling):
            time.sleep(0.2)
        fcntl.flock(running, fcntl.LOCK_EX)
        row = run(name, config, mesh, step, rates, arguments.steps)
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return row | {"seconds": seconds} | versions


def free(file) -> bool:
    """Whether nobody else holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--config", default="configs/small_gpu.py")
    parser.add_argument("--layers", type=int, default=4, help="all MoE; even")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=2, help="of a micro-batch on a device")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--compile-seconds", type=float, default=150, help="then those that are ready run")
    parser.add_argument("--seconds", type=float, default=280, help="for all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--locks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.child:
        row = measure(arguments.child, arguments, overrides)
        (arguments.locks / f"{arguments.child}.json").write_text(json.dumps(row))
        sys.stdout.flush()
        os._exit(0)  # Nothing to tidy up, and the memory is wanted.

    began, results = time.time(), {}
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        environment["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
    with tempfile.TemporaryDirectory() as folder:
        more = [f"--locks={folder}", f"--until={began + arguments.compile_seconds}"]
        children = {}
        for name in arguments.variants.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], *more, f"--child={name}"]
            with open(Path(folder) / f"{name}.log", "w") as log:
                children[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        waiting = dict(children)
        while waiting and time.time() - began < arguments.seconds:
            time.sleep(0.5)
            for name in [name for name, child in waiting.items() if child.poll() is not None]:
                code, file = waiting.pop(name).returncode, Path(folder) / f"{name}.json"
                log = (Path(folder) / f"{name}.log").read_text()
                row = (
                    json.loads(file.read_text())
                    if file.exists()
                    else {"error": f"exit {code}: {log[-3000:]}"}
                )
                results[name] = row
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                brief = {key: value for key, value in row.items() if key != "schedule"}
                print(f"{time.time() - began:.0f} s: {name}", json.dumps(brief), flush=True)
        for name, child in waiting.items():
            child.kill()
            log = (Path(folder) / f"{name}.log").read_text()
            print(f"{name}: stopped after {arguments.seconds} s: {log[-1500:]}")
    print(f"\n{'':10}{'tokens/s':>10}{'loss':>9}{'GiB':>8}{'assigned':>10}{'counted':>9}{'compile':>9}")
    for name, row in results.items():
        if "error" not in row:
            memory = f"{row['peak_gib']:>8.1f}{row['assigned_gib']:>10.1f}{row['counted_gib']['all']:>9.1f}"
            speed, loss = row["tokens_per_second"], row["loss"]
            print(f"{name:10}{speed:>10.0f}{loss:>9.4f}{memory}{row['seconds']['compile']:>9.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

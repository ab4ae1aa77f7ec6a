"""Training through a pipeline on two devices beside data and expert parallelism: tokens/s, memory, overlap.

    python benchmarks/pipeline_gpu.py [--config=configs/small_gpu.py] [--out FILE] [--config.FIELD=VALUE ...]

The configuration's model, cut to layers that both stages share evenly, with random weights and tokens. Every
variant trains on the same tokens a step:

    data          two replicas, the micro-batches one after the other
    1f1b, zb1p, dualpipe   two stages on two devices
    expert        experts on two devices, no pipeline
    overlap       the same, and DualPipeV on one rank: forward of one micro-batch beside backward of another

Memory is the allocator's peak and XLA's assignment for the step, beside what the planner counts. One step
of each is profiled. Of pipelines: the idle share between the first cell and the last, beside the simulator's
with the times that the cells took. Of all: how much of the time of collectives lies under computation; with
experts spread, which instructions the compiler put between the start and the end of each all-to-all.
"""

import argparse
import fcntl
import gzip
import json
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
from pipeline_variants import VARIANTS, compiled, counted_memory, random_batch, random_state, variant_of  # noqa: E402

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_command_buffer=",  # So that the profile names the instruction of each kernel.
)


def run(name, config, mesh, step, rates, steps, raw) -> dict:
    import jax
    import numpy as np
    import pipeline_profile

    from benchmarks import profile_events
    from dsv3_jax.pipeline import build

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
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, metrics = step(state, batch, n_micro, rates)
            jax.block_until_ready(metrics)
        text = step.as_text()
        if raw:
            keep(raw, name, folder, text)
        found = guarded(lambda: profile_events.events(folder))
    row["profile"] = guarded(lambda: pipeline_profile.overlap(found))
    if mesh.shape["expert"] > 1:
        row["schedule"] = guarded(lambda: pipeline_profile.between(text))
    if mesh.shape["pipe"] > 1:
        schedule = build(config.train.pipeline, mesh.shape["pipe"], int(n_micro))
        row["bubble"] = guarded(lambda: pipeline_profile.bubble(found, text, schedule))
    return row


def keep(folder, name, profile, text):
    """What the figures came from: the profile, and the program with its buffers."""
    files = {"program": text}
    for dump in Path(os.environ["PIPELINE_DUMP"]).glob("*"):
        if re.search(r"(buffer-assignment|memory-usage-report)\.txt$", dump.name):
            files[dump.name] = dump.read_text()
    with gzip.open(folder / f"{name}.json.gz", "wt", compresslevel=6) as file:
        json.dump(files, file)
    for found in Path(profile).rglob("*.xplane.pb"):
        (folder / f"{name}.xplane.pb.gz").write_bytes(gzip.compress(found.read_bytes(), 6))


def guarded(function) -> Any:
    """Its result, or what went wrong: a profile that cannot be read costs no measurement."""
    try:
        return function()
    except Exception:
        return {"error": traceback.format_exc()[-600:]}


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
        row = run(name, config, mesh, step, rates, arguments.steps, arguments.raw)
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


def report(results):
    """The variants side by side."""
    results = {name: row for name, row in results.items() if "error" not in row}
    print(f"\n{'':10}{'tokens/s':>10}{'loss':>9}{'GiB':>8}{'assigned':>10}{'counted':>9}{'compile':>9}")
    for name, row in results.items():
        memory = f"{row['peak_gib']:>8.1f}{row['assigned_gib']:>10.1f}{row['counted_gib']['all']:>9.1f}"
        speed, loss = row["tokens_per_second"], row["loss"]
        print(f"{name:10}{speed:>10.0f}{loss:>9.4f}{memory}{row['seconds']['compile']:>9.0f}")
    kinds = "measured", "own", "in_step", "free"
    head = "".join(f"{what + ': measured':>17}{'own':>9}{'means':>9}{'free':>9}" for what in ("ms", "idle"))
    print(f"\n{'':10}{head}")
    for name, row in results.items():
        if "measured" in row.get("bubble", {}):
            found = [row["bubble"][kind] for kind in kinds]
            times = "{:>17.1f}{:>9.1f}{:>9.1f}{:>9.1f}".format(*(one["step_ms"] for one in found))
            shares = "{:>17.4f}{:>9.4f}{:>9.4f}{:>9.4f}".format(*(one["idle"] for one in found))
            print(f"{name:10}{times}{shares}")
    for name, row in results.items():
        if "error" in row.get("bubble", {}):
            print(f"{name}: {row['bubble']['error']}")


def start(name, folder, arguments, until) -> subprocess.Popen:
    """`measure` in a process of its own, which writes to files of the variant's name in the folder."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PIPELINE_DUMP": f"{folder}/{name}"}
    flags = [os.environ.get("XLA_FLAGS", "")]
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        flags += FLAGS
    if arguments.raw:
        arguments.raw.mkdir(parents=True, exist_ok=True)
        flags += [f"--xla_dump_to={folder}/{name}", "--xla_dump_hlo_module_re=jit_step"]
    more = [f"--locks={folder}", f"--until={until}", f"--child={name}"]
    with open(Path(folder) / f"{name}.log", "w") as log:
        command = [sys.executable, __file__, *sys.argv[1:], *more]
        return subprocess.Popen(
            command, env=environment | {"XLA_FLAGS": " ".join(flags)}, stdout=log, stderr=log
        )


def measure_all(arguments) -> dict:
    """What `measure` found of each variant, or its error."""
    began, results = time.time(), {}
    with tempfile.TemporaryDirectory() as folder:
        until = began + arguments.compile_seconds
        waiting = {name: start(name, folder, arguments, until) for name in arguments.variants.split(",")}

        def log_of(name):
            return (Path(folder) / f"{name}.log").read_text()

        while waiting and time.time() - began < arguments.seconds:
            time.sleep(0.5)
            for name in [name for name, child in waiting.items() if child.poll() is not None]:
                code, file = waiting.pop(name).returncode, Path(folder) / f"{name}.json"
                if file.exists():
                    row = json.loads(file.read_text())
                else:
                    row = {"error": f"exit {code}: {log_of(name)[-3000:]}"}
                results[name] = row
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                brief = {key: value for key, value in row.items() if key not in ("schedule", "bubble")}
                print(f"{time.time() - began:.0f} s: {name}", json.dumps(brief), flush=True)
        for name, child in waiting.items():
            child.kill()
            print(f"{name}: stopped after {arguments.seconds} s: {log_of(name)[-1500:]}")
    return results


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
    parser.add_argument("--raw", type=Path, help="a folder for profiles, programs and buffers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--locks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.child:
        row = measure(arguments.child, arguments, overrides)
        (arguments.locks / f"{arguments.child}.json").write_text(json.dumps(row))
        sys.stdout.flush()
        os._exit(0)  # Nothing to tidy up, and the memory is wanted.

    report(measure_all(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())

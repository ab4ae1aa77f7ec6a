"""Expert parallelism on the GPUs of one host: that it is exact, how fast tokens travel, and what it trains.

    PYTHONPATH=. python benchmarks/expert_parallel.py [--out results.json] [--runs "exchange;16b bf16"]

Runs are processes of their own, and the results are written after each. First these, one after the other:

    differences             the experts over all GPUs against one GPU, bf16 and FP8, balanced and skewed
    bandwidth               dispatch and combine of 32k tokens x 7168 a GPU (top 8 of 256), by each transport,
                            beside a dense all-to-all of the same buffer
    copies                  the kernel of `remote` alone, on the same tokens, its work divided in several ways

then training, compiled side by side and run one after the other:

    16b bf16, 16b fp8       `configs/v2_lite_2gpu.py`: tokens/s a GPU
    small, ...              `configs/small_gpu.py` on one GPU, and data- and expert-parallel on all of them
                            with the same batch a GPU; the bias moves twenty times as fast as configured,
                            so that the router is balanced within the run

A bandwidth counts the bytes that leave a GPU for another, over the median time of a call. A speed is the
median over blocks of five steps after the first two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Collectives run beside computation only if the scheduler is asked for it.
FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true"
BLOCK = 5  # Steps that are timed together.


def differences(tokens: int = 512, d: int = 1024, f: int = 256) -> dict[str, float]:
    """Norms of the differences from one GPU over norms, the largest of output and gradients, by case."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.config import FP8Config, MeshConfig
    from dsv3_jax.model.experts import routed_experts
    from dsv3_jax.parallel.mesh import make_mesh, use_mesh

    n, rng = len(jax.devices()), np.random.default_rng(0)
    shapes = {"u": (n, tokens, d), "gates": (n, tokens, 4), "gate_up": (16, d, 2 * f), "down": (16, f, d)}
    t = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    t["gate_up"], t["down"] = t["gate_up"] / d**0.5, t["down"] / f**0.5
    dy = rng.standard_normal(shapes["u"]).astype(np.float32)
    balanced = rng.permuted(np.tile(np.arange(16), (n * tokens, 1)), axis=1)[:, :4].reshape(n, tokens, 4)
    loads = {"balanced": balanced, "four experts take everything": np.tile(np.arange(4), (n, tokens, 1))}

    def run(ranks, load, recipe):
        config = MeshConfig(data=1, expert=ranks)
        mesh = make_mesh(config)

        def step(t, load, dy):
            def forward(t):
                u = t["u"].astype(jnp.bfloat16)
                return routed_experts(u, load, t["gates"], t["gate_up"], t["down"], "auto", recipe)

            with use_mesh(mesh, config):
                out, back = jax.vjp(forward, t)
                return {"out": out} | back(dy.astype(jnp.bfloat16))[0]

        return jax.device_get(jax.jit(step)(t, load.astype(np.int32), dy))

    found = {}
    for precision, recipe in (("bf16", None), ("fp8", FP8Config())):
        for name, load in loads.items():
            ours, one = run(n, load, recipe), run(1, load, recipe)
            wide = {k: (np.float64(ours[k]), np.float64(one[k])) for k in one}
            apart = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in wide.values()]
            found[f"{precision}, {name}"] = float(max(apart))
    # bf16 sums in another order: 2^-9 each. In FP8 tokens share tiles with others, which rounds them anew, by
    # 0.026 an operand.
    assert all(x < (6e-2 if name.startswith("fp8") else 6e-3) for name, x in found.items()), found
    return found


def measured(steps: int, argv: list[str]) -> dict:
    """A training run on real text: speed, losses, balance, memory, and the kernels of a step on all GPUs."""
    from benchmarks import timing  # Before JAX allocates.

    # isort: split
    import jax
    import numpy as np

    import train as trainer
    from benchmarks.fp8_train import by_kind
    from dsv3_jax.data import Loader
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training import loop
    from dsv3_jax.training.state import abstract_state, init_state
    from dsv3_jax.training.step import make_train_step
    from dsv3_jax.training.throughput import flops_per_token, peak_flops

    config, _ = trainer.parse(argv)
    mesh = make_mesh(config.mesh)
    sequences, seq_len = config.train.batch_size, config.train.seq_len
    tokens = sequences * seq_len
    process = dict(process_index=0, process_count=1)
    loader = Loader(config.data, split="train", seq_len=seq_len, seed=config.train.seed, **process)

    def inputs(step):
        batch, count = loop.put_batch(config, mesh, loader.take(sequences), sequences)
        return batch, count, loop.schedules_at(config, step, step * tokens)

    started = time.perf_counter()
    jitted: Any = make_train_step(config, mesh)
    step_function = jitted.lower(abstract_state(config, mesh), *inputs(0)).compile()
    found: dict = {"compile_seconds": time.perf_counter() - started, "mesh": dict(mesh.shape)}
    if not steps:
        return found
    state = init_state(config, mesh)
    memory, rates, losses, metrics = step_function.memory_analysis(), [], [], None
    for first in range(0, steps, BLOCK):
        started = time.perf_counter()
        for step in range(first, first + BLOCK):
            state, metrics = step_function(state, *inputs(step))
            losses.append(metrics.losses.ce_loss)
        jax.block_until_ready(metrics)
        rates.append(BLOCK * tokens / (time.perf_counter() - started))
    assert metrics is not None and bool(metrics.finite)
    speed, peak = statistics.median(rates[2:]), peak_flops(list(mesh.devices.flat))
    found |= {
        "tokens_per_second_per_gpu": speed / mesh.size,
        "mfu": speed * flops_per_token(config, state.params) / peak if peak else None,
        "rates": [round(rate) for rate in rates],
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "state_gib": memory.argument_size_in_bytes / 2**30,
        "peak_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "losses": [round(float(loss), 4) for loss in losses],
        "max_vio": [round(float(x), 2) for x in np.asarray(metrics.max_vio)],
    }
    print(json.dumps(found), flush=True)
    if jax.default_backend() == "gpu":
        last = inputs(steps)
        kinds = by_kind(timing.kernels(lambda: jax.block_until_ready(step_function(state, *last))))
        print(json.dumps(found | {"kernels": kinds}), flush=True)
    return found


def start(log: Path, *arguments: str, devices: int, flags: str) -> subprocess.Popen:
    """A process of this file on the first `devices` GPUs, whose output goes to `log`."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices)))}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    with open(log, "w") as file:
        command = [sys.executable, __file__, *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def result(log: Path, why: str) -> dict:
    """What a process printed last that is JSON; what went wrong if there is nothing."""
    output = log.read_text()
    print(
        *(line for line in output.splitlines() if line.startswith(("dense", "ragged", "remote", "  "))),
        sep="\n",
    )
    found = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(found[-1]) if found else {"failed": why, "output": output[-1500:]}


def transports(part: str) -> dict:
    """What `benchmarks.transports` measures, which imports JAX."""
    from benchmarks import transports

    return getattr(transports, part)()


PARTS = {
    "differences": differences,
    "bandwidth": lambda: transports("bandwidths"),
    "copies": lambda: transports("copies"),
}


def training_runs(count: int) -> dict[str, tuple[int, str, list[str]]]:
    """By name: GPUs, more flags for XLA, and the configuration."""
    large = ["--config=configs/v2_lite_2gpu.py", f"--config.mesh.expert={count}"]
    large += [f"--config.train.batch_size={3 * count}"]
    small = ["--config=configs/small_gpu.py", "--config.model.moe.bias_speed=0.02"]
    whole = [*small, f"--config.train.batch_size={8 * count}", f"--config.mesh.data={count}"]
    pipelined = " ".join(
        f"--xla_gpu_enable_pipelined_{name}=true" for name in ("all_reduce", "reduce_scatter")
    )
    return {
        "small, one GPU": (1, "", small),
        "small, data-parallel, zero1": (count, "", [*whole, "--config.mesh.sharding=zero1"]),
        "small, data-parallel, fsdp": (count, "", [*whole, "--config.mesh.sharding=fsdp"]),
        "small, data-parallel, replicated": (count, "", [*whole, "--config.mesh.sharding=replicated"]),
        "small, data-parallel, replicated, pipelined": (
            count,
            pipelined,
            [*whole, "--config.mesh.sharding=replicated"],
        ),
        "small, expert-parallel": (
            count,
            "",
            [*whole, "--config.mesh.data=1", f"--config.mesh.expert={count}", "--config.mesh.sharding=zero1"],
        ),
        "16b bf16": (count, "", large),
        "16b fp8": (count, "", [*large, "--config.train.precision=fp8"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="", help="names, separated by semicolons; all by default")
    parser.add_argument("--steps", type=int, default=30, help=f"of training, a multiple of {BLOCK}, from 15")
    parser.add_argument("--seconds", type=float, default=600, help="the longest that all may take")
    parser.add_argument("--out", default="benchmarks/results/expert_parallel.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments, configuration = parser.parse_known_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part]()))
        return
    if configuration:
        measured(arguments.steps, configuration)
        return
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    count, results = len(listed.stdout.strip().splitlines()), {}
    training, began = training_runs(count), time.time()
    wanted = arguments.runs.split(";") if arguments.runs else [*PARTS, *training]

    def keep(name: str, log: Path, why: str) -> None:
        results[name] = found = result(log, why)
        one = results.get("small, one GPU", {}).get("tokens_per_second_per_gpu")
        for run, values in results.items():
            if one and run.startswith("small") and "tokens_per_second_per_gpu" in values:
                gpus = training[run][0]
                values["of_one_gpu"] = values["tokens_per_second_per_gpu"] * gpus / one
        brief = {key: value for key, value in found.items() if key not in ("kernels", "losses")}
        print(f"{time.time() - began:.0f} s: {name}: {json.dumps(brief)[:2000]}", flush=True)
        content = {"flags": FLAGS, "steps": arguments.steps, "runs": results}
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")

    def wait(child: subprocess.Popen) -> None:
        try:
            child.wait(max(1, arguments.seconds - (time.time() - began)))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        for part in (part for part in PARTS if part in wanted):
            wait(child := start(folder / part, f"--part={part}", devices=count, flags=FLAGS))
            keep(part, folder / part, f"exit code {child.returncode}")
        # Compiling leaves memory of a GPU with its process; so other processes run, after these have ended.
        for steps in (0, arguments.steps):
            children = {}
            for run, (devices, flags, argv) in training.items():
                if run in wanted:
                    log = folder / f"{run} {steps}"
                    children[run] = start(
                        log, f"--steps={steps}", *argv, devices=devices, flags=f"{FLAGS} {flags}"
                    )
                    if steps:
                        wait(children[run])
                        keep(run, log, f"exit code {children[run].returncode}")
            for child in children.values():
                wait(child)


if __name__ == "__main__":
    main()

"""Expert parallelism on the GPUs of one host: that it is exact, how fast tokens travel, and what it trains.

    PYTHONPATH=. python benchmarks/expert_parallel.py [--out results.json] [--runs "exchange;16b bf16"]

Runs are processes of their own, one after the other, each with its own time limit, and the results are
written after each:

    exchange                the experts over all GPUs against one GPU, bf16 and FP8, balanced and skewed; then
                            dispatch and combine of 32k tokens x 7168 a GPU (top 8 of 256) beside a dense
                            all-to-all of the same buffer
    16b bf16, 16b fp8       `configs/v2_lite_2gpu.py`: tokens/s a GPU
    small, ...              `configs/small_gpu.py` on one GPU, and data- and expert-parallel on all of them
                            with the same batch a GPU

A bandwidth counts the bytes that leave a GPU for another, over the median time of a call. A speed is the
median over blocks of five steps after the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Collectives run beside computation only if the scheduler is asked for it.
FLAGS = "--xla_gpu_enable_latency_hiding_scheduler=true"
BLOCK = 5  # Steps that are timed together.
TOKENS, WIDTH, EXPERTS, TOP_K = 32768, 7168, 256, 8


def exchange_part(tokens: int = TOKENS, width: int = WIDTH) -> dict:
    """Differences from one GPU, and bandwidths."""
    import jax

    return {
        "devices": len(jax.devices()),
        "device": jax.devices()[0].device_kind,
        "differences": differences(),
        "bandwidth": bandwidths(tokens, width),
    }


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


def bandwidths(tokens: int, width: int) -> dict[str, dict[str, float]]:
    """GB/s a GPU and milliseconds of a dense all-to-all, and of dispatch and combine by each transport."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from dsv3_jax.parallel.exchange import capacity, exchange, rounds
    from dsv3_jax.parallel.transport import Wire

    n = len(jax.devices())
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    rng = np.random.default_rng(1)
    indices = np.argpartition(rng.random((n * tokens, EXPERTS), np.float32), TOP_K, axis=1)[:, :TOP_K]
    apart = indices // (EXPERTS // n) != np.repeat(np.arange(n), tokens)[:, None]
    rank = np.where(apart, indices // (EXPERTS // n), -1)
    crossing = (
        float(sum((rank == r).any(1).sum() for r in range(n))) / n
    )  # Tokens that leave a GPU, for each peer.
    place = NamedSharding(mesh, P("expert"))
    indices = jax.device_put(indices.astype(np.int32), place)
    x = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), (n * tokens, width), jnp.bfloat16), out_shardings=place
    )()

    def seconds(function, *operands):
        call = jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
        )
        out = jax.block_until_ready(call(*operands))
        times = []
        for _ in range(7):
            started = time.perf_counter()
            jax.block_until_ready([call(*operands) for _ in range(10)][-1])
            times.append((time.perf_counter() - started) / 10)
        return statistics.median(times), out

    def there_and_back(to, x):
        return to.home(to.send(x))

    found = {}

    def note(name, crossed, elapsed):
        found[name] = {"ms": round(1e3 * elapsed, 3), "gb_per_s": round(crossed / elapsed / 1e9, 1)}
        print(name, found[name], flush=True)

    row = 2 * width
    for transport in ("dense", "ragged") if jax.default_backend() == "gpu" else ("dense", "gather"):
        wire = Wire("expert", n, transport, 1.25)
        room = capacity(tokens, TOP_K, EXPERTS, wire)

        def route(i, wire=wire, room=room):
            return exchange(i, EXPERTS, wire, room, rounds(i, EXPERTS, wire, room), 0)

        if transport == "dense":
            buffer = jnp.zeros((n * n * room.slots, width), jnp.bfloat16, device=place)
            shape = (n, room.slots, width)
            whole = (n - 1) * room.slots * row
            elapsed, _ = seconds(
                lambda b, s=shape: lax.all_to_all(b.reshape(s), "expert", 0, 0).reshape(b.shape), buffer
            )
            note("dense all-to-all", whole, elapsed)
        elapsed, to = seconds(route, indices)
        note(f"{transport}: plan", 0, elapsed)
        elapsed, arrived = seconds(lambda to, x: to.send(x), to, x)
        note(f"{transport}: dispatch", crossing * row, elapsed)
        elapsed, _ = seconds(lambda to, a: to.home(a), to, arrived)
        note(f"{transport}: combine", crossing * row, elapsed)
        elapsed, _ = seconds(lambda i, x, route=route: there_and_back(route(i), x), indices, x)
        note(f"{transport}: plan, dispatch and combine", 2 * crossing * row, elapsed)
    reference = found["dense all-to-all"]["gb_per_s"]
    for values in found.values():
        values["of_dense"] = round(values["gb_per_s"] / reference, 3)
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
    from dsv3_jax.training.state import init_state
    from dsv3_jax.training.step import make_train_step
    from dsv3_jax.training.throughput import flops_per_token, peak_flops

    config, _ = trainer.parse(argv)
    mesh = make_mesh(config.mesh)
    sequences, seq_len = config.train.batch_size, config.train.seq_len
    tokens = sequences * seq_len
    process = dict(process_index=0, process_count=1)
    loader = Loader(config.data, split="train", seq_len=seq_len, seed=config.train.seed, **process)
    state = init_state(config, mesh)

    def inputs(step):
        batch, count = loop.put_batch(config, mesh, loader.take(sequences), sequences)
        return batch, count, loop.schedules_at(config, step, step * tokens)

    started = time.perf_counter()
    jitted: Any = make_train_step(config, mesh)
    step_function = jitted.lower(state, *inputs(0)).compile()
    found: dict = {"compile_seconds": time.perf_counter() - started, "mesh": dict(mesh.shape)}
    memory, rates, losses, metrics = step_function.memory_analysis(), [], [], None
    for first in range(0, steps, BLOCK):
        started = time.perf_counter()
        for step in range(first, first + BLOCK):
            state, metrics = step_function(state, *inputs(step))
            losses.append(metrics.losses.ce_loss)
        jax.block_until_ready(metrics)
        rates.append(BLOCK * tokens / (time.perf_counter() - started))
    assert metrics is not None and bool(metrics.finite)
    speed, peak = statistics.median(rates[1:]), peak_flops(list(mesh.devices.flat))
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


def run(seconds: float, *arguments: str, devices: int = 0) -> dict:
    """What a process of this file printed last that is JSON; the reason if there is nothing."""
    environment = dict(os.environ)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=seconds
        )
        output, why = done.stdout, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:  # What it had measured by then still counts.
        partial = error.stdout or b""
        output = partial.decode() if isinstance(partial, bytes) else partial
        why = f"not done in {seconds:.0f} s"
    results = [line for line in output.splitlines() if line.startswith("{")]
    print(*(line for line in output.splitlines() if not line.startswith("{")), sep="\n", flush=True)
    return json.loads(results[-1]) if results else {"failed": why, "output": output[-1000:]}


def runs(count: int) -> dict[str, tuple[float, int, list[str]]]:
    """By name: the longest that it may take, GPUs, and its configuration; the most important first."""
    large = ["--config=configs/v2_lite_2gpu.py", f"--config.mesh.expert={count}"]
    large += [f"--config.train.batch_size={3 * count}"]
    small = ["--config=configs/small_gpu.py"]
    all_gpus = [f"--config.train.batch_size={8 * count}", "--config.mesh.sharding=zero1"]
    return {
        "exchange": (100, count, ["--exchange"]),
        "16b bf16": (130, count, large),
        "small, one GPU": (75, 1, small),
        "small, expert-parallel": (80, count, [*small, *all_gpus, f"--config.mesh.expert={count}"]),
        "small, data-parallel": (80, count, [*small, *all_gpus, f"--config.mesh.data={count}"]),
        "16b fp8": (170, count, [*large, "--config.train.precision=fp8"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="", help="names, separated by semicolons; all by default")
    parser.add_argument("--steps", type=int, default=15, help=f"of training, a multiple of {BLOCK}")
    parser.add_argument("--seconds", type=float, default=600, help="the longest that all may take")
    parser.add_argument("--out", default="benchmarks/results/expert_parallel.json")
    parser.add_argument("--exchange", action="store_true", help="measure the exchange in this process")
    arguments, configuration = parser.parse_known_args()
    if arguments.exchange:
        print(json.dumps(exchange_part()))
        return
    if configuration:
        measured(arguments.steps, configuration)
        return
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    plan, results, end = runs(len(listed.stdout.strip().splitlines())), {}, time.time() + arguments.seconds
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    for name in arguments.runs.split(";") if arguments.runs else plan:
        limit, devices, argv = plan[name]
        started = time.time()
        if end - started < limit / 2:
            results[name] = {"failed": "no time left"}
            continue
        found = run(min(limit, end - started), f"--steps={arguments.steps}", *argv, devices=devices)
        one = results.get("small, one GPU", {}).get("tokens_per_second_per_gpu")
        if one and name.startswith("small") and "tokens_per_second_per_gpu" in found:
            found["of_one_gpu"] = found["tokens_per_second_per_gpu"] * devices / one
        results[name] = found
        brief = {k: v for k, v in found.items() if k not in ("kernels", "losses")}
        print(f"{name}, {time.time() - started:.0f} s: {json.dumps(brief)[:2500]}", flush=True)
        content = {"flags": FLAGS, "steps": arguments.steps, "runs": results}
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

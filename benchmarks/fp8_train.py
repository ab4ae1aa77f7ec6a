"""Training in FP8 beside bf16 in one run: tokens/s, memory, the router's balance, and where the time goes.

    PYTHONPATH=. python benchmarks/fp8_train.py [--config=configs/small_gpu.py] [--steps 40]
        [--precisions bf16,fp8] [--out results.json] [--config.FIELD=VALUE ...]

Both precisions start from the same parameters and see the same text. Speed is the median over blocks of
five steps after the first two blocks. `temporary_gib` is what the compiled step needs besides its state:
activations and gradients. One more step runs under CUPTI, and its kernels are added up by name.
"""

import argparse
import collections
import gc
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import timing  # Before JAX allocates.

# isort: split
import jax
import numpy as np

import train as trainer
from dsv3_jax.data import Loader
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import loop
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import make_train_step
from dsv3_jax.training.throughput import flops_per_token, peak_flops

BLOCK = 5
GIB = 2.0**30


def by_kind(found: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Milliseconds and launches of the kernels of a step, by name without its numbers, the longest first."""
    total, count = collections.defaultdict(float), collections.Counter()
    for name, seconds in found:
        kind = re.sub(r"[_.]?\d+", "", name)[:60]
        total[kind] += 1e3 * seconds
        count[kind] += 1
    longest = sorted(total.items(), key=lambda item: -item[1])
    return {kind: {"ms": round(ms, 2), "launches": count[kind]} for kind, ms in longest[:40]}


def run(config, steps: int) -> dict:
    """Trains for `steps` steps; speed, memory, losses, balance and kernels."""
    mesh = make_mesh(config.mesh)
    process = dict(process_index=0, process_count=1)
    sequences, seq_len = config.train.batch_size, config.train.seq_len
    loader = Loader(config.data, split="train", seq_len=seq_len, seed=config.train.seed, **process)
    state = init_state(config, mesh)
    flops, tokens = flops_per_token(config, state.params), sequences * seq_len

    def inputs(step):
        batch, count = loop.put_batch(config, mesh, loader.take(sequences), sequences)
        return batch, count, loop.schedules_at(config, step, step * tokens)

    started = time.perf_counter()
    step_function = make_train_step(config, mesh).lower(state, *inputs(0)).compile()
    compiled = time.perf_counter() - started
    memory, metrics, losses, rates = step_function.memory_analysis(), None, [], []
    for first in range(0, steps, BLOCK):
        started = time.perf_counter()
        for step in range(first, first + BLOCK):
            state, metrics = step_function(state, *inputs(step))
            losses.append(metrics.losses.ce_loss)
        jax.block_until_ready(metrics)
        rates.append(BLOCK * tokens / (time.perf_counter() - started))
    speed = statistics.median(rates[2:])
    peak = peak_flops(list(mesh.devices.flat))
    assert metrics is not None and bool(metrics.finite)
    last = inputs(steps)
    found = []
    if jax.default_backend() == "gpu":
        found = timing.kernels(lambda: jax.block_until_ready(step_function(state, *last)))
    loader.close()
    return {
        "tokens_per_second": speed,
        "mfu": speed * flops / peak if peak else None,
        "rates": [round(rate) for rate in rates],
        "temporary_gib": memory.temp_size_in_bytes / GIB,
        "state_gib": memory.argument_size_in_bytes / GIB,
        "compile_seconds": compiled,
        "losses": [round(float(loss), 5) for loss in losses],
        "max_vio": [round(float(x), 2) for x in np.asarray(metrics.max_vio)],
        "kernel_ms": sum(seconds for _, seconds in found) * 1e3,
        "kernels": by_kind(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/small_gpu.py")
    parser.add_argument("--steps", type=int, default=40, help="a multiple of 5")
    parser.add_argument("--precisions", default="bf16,fp8")
    parser.add_argument("--out", default="benchmarks/results/fp8_train.json")
    arguments, overrides = parser.parse_known_args()
    results = {}
    for precision in arguments.precisions.split(","):
        argv = [f"--config={arguments.config}", *overrides, f"--config.train.precision={precision}"]
        config, _ = trainer.parse(argv)
        found = results[precision] = run(config, arguments.steps)
        gc.collect()
        brief = {k: v for k, v in found.items() if k not in ("kernels", "losses", "rates")}
        print(precision, json.dumps(brief), "last losses", found["losses"][-3:], flush=True)
        content = {"config": arguments.config, "overrides": overrides, "steps": arguments.steps}
        content |= {"versions": timing.versions(), "results": results}
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")
    if {"bf16", "fp8"} <= set(results):
        ours, plain = results["fp8"], results["bf16"]
        print(
            f"fp8 / bf16: tokens/s {ours['tokens_per_second'] / plain['tokens_per_second']:.3f},",
            f"temporary memory {ours['temporary_gib'] / plain['temporary_gib']:.3f}",
        )


if __name__ == "__main__":
    main()

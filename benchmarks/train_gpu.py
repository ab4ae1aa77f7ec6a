"""Tokens/s, MFU and peak memory of training on this GPU, on real text through `train.py`.

    python benchmarks/train_gpu.py [--config=configs/small_gpu.py] [--steps=50] [--config.FIELD=VALUE ...]

First it checks a cut-down model of the same widths: the loss and the gradient norm with the kernels that
"auto" chooses against those of the plain JAX references. Then it trains, and prints the median of the logged
speeds after the first (which holds the compilation). Results go to `--out` as JSON.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train as trainer  # noqa: E402


def check(config) -> dict[str, float]:
    """Relative differences of loss and gradient norm, kernels against references, on one sequence."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training.state import init_state
    from dsv3_jax.training.step import Schedules, train_step

    results = {}
    for name in ("auto", "reference"):
        model = config.model
        model = dataclasses.replace(
            model,
            n_layers=2,
            attention=dataclasses.replace(model.attention, implementation=name),
            moe=dataclasses.replace(model.moe, n_dense_layers=1, n_experts=8, top_k=2, implementation=name),
        )
        fp8 = dataclasses.replace(config.fp8, implementation=name)
        small = dataclasses.replace(config, model=model, fp8=fp8)
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, 1, 513)).astype(np.int32)
        batch = {
            "tokens": tokens[..., :-1],
            "targets": tokens[..., 1:],
            "positions": np.arange(512, dtype=np.int32)[None, None],
            "segment_ids": np.ones((1, 1, 512), np.int32),
            "loss_mask": np.ones((1, 1, 512), bool),
        }
        state = init_state(small, make_mesh(small.mesh))
        rates = Schedules(jnp.float32(0), jnp.float32(0), jnp.float32(0.3))
        step = jax.jit(lambda state, batch, c=small, r=rates: train_step(c, state, batch, 1, r)[1])
        metrics = jax.device_get(step(state, batch))
        results[name] = (float(metrics.losses.loss), float(metrics.grad_norm))
    pairs = zip(("loss", "grad_norm"), results["auto"], results["reference"], strict=True)
    return {name: abs(ours / plain - 1) for name, ours, plain in pairs}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/small_gpu.py")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="")
    arguments, overrides = parser.parse_known_args()
    fixed = [
        f"--config.train.steps={arguments.steps}",
        "--config.train.log_every=5",
        "--config.train.eval_every=0",
        "--config.train.eval_batches=1",
        "--config.checkpoint.every=0",
        "--config.train.sample_tokens=0",
    ]
    argv = [f"--config={arguments.config}", *fixed, *overrides]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # As train.py, which comes later.
    import jax

    config, _ = trainer.parse(argv)
    differences = check(config)
    print("kernels against references, relative:", differences)
    # bf16 products summed in another order: 2^-9 a rounding, averaged over many; more is a defect.
    assert max(differences.values()) < 1e-2, differences
    with tempfile.TemporaryDirectory() as workdir:
        trainer.main([*argv, f"--workdir={workdir}"])
        lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if line["step"] > 5]
    summary = {
        "config": arguments.config,
        "overrides": overrides,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timed),
        "mfu": statistics.median(line["mfu"] for line in timed) if "mfu" in timed[0] else None,
        "peak_memory_gib": lines[-1].get("peak_memory_gib"),
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "max_vio": lines[-1]["max_vio"],
        "check": differences,
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(summary, indent=1))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()

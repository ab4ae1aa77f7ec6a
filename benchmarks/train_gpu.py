"""Tokens/s, MFU and peak memory of training on this GPU, on real text through `train.py`.

    python benchmarks/train_gpu.py [--config=configs/small_gpu.py] [--steps=50] [--config.FIELD=VALUE ...]
    python benchmarks/train_gpu.py --attention=auto,cudnn [--steps=15] ...

First it checks a cut-down model of the same widths: the loss and the gradient norm with the kernels that
"auto" chooses against those of the plain JAX references. Then it trains, and prints the median of the logged
speeds after the first (which holds the compilation). Results go to `--out` as JSON.

With `--attention`, one run goes on from one implementation of attention to the next and back, five steps each
(`--steps` of each in all): so all see the same GPU, state and text. Printed are the medians after each one's
first turn.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train as trainer  # noqa: E402

TURN = 5  # steps


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


def compare(config, names, steps, after) -> dict[str, dict]:
    """Speed of each implementation of attention, taking turns within one run."""

    from dsv3_jax.data import Loader
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training import loop
    from dsv3_jax.training.state import abstract_state, init_state
    from dsv3_jax.training.step import make_train_step

    mesh, train = make_mesh(config.mesh), config.train
    sequences, tokens = train.batch_size, train.batch_size * train.seq_len
    loader = Loader(
        config.data, split="train", seq_len=train.seq_len, seed=train.seed, **loop.data_share(mesh)
    )

    def inputs(step):
        batch, count = loop.put_batch(config, mesh, loader.take(sequences), sequences)
        return batch, count, loop.schedules_at(config, step, step * tokens)

    functions, abstract, first = {}, abstract_state(config, mesh), inputs(0)
    for name in names:
        attention = dataclasses.replace(config.model.attention, implementation=name)
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
        functions[name] = make_train_step(changed, mesh).lower(abstract, *first).compile()
        print(name, "compiled", flush=True)
    while after and not Path(after).exists():
        time.sleep(0.1)
    state, step = init_state(config, mesh), 0
    speeds, losses = {name: [] for name in names}, {name: [] for name in names}
    for turn in range(steps // TURN):
        for name in names if turn % 2 == 0 else reversed(names):
            started = time.perf_counter()
            for _ in range(TURN):
                state, metrics = functions[name](state, *inputs(step))
                step += 1
            losses[name].append(float(metrics.losses.loss))
            speeds[name].append(TURN * tokens / (time.perf_counter() - started))
    loader.close()
    return {
        name: {"tokens_per_second": statistics.median(speeds[name][1:]), "turns": speeds[name]}
        | {"losses": losses[name]}
        for name in names
    }


def versions() -> dict:
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "date": datetime.date.today().isoformat(),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/small_gpu.py")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--attention", default="", help="implementations to compare, separated by commas")
    parser.add_argument("--after", default="", help="compile for --attention, then wait for this file")
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
    config, _ = trainer.parse(argv)
    if arguments.attention:
        names = arguments.attention.split(",")
        found = compare(config, names, arguments.steps, arguments.after)
        write({"config": arguments.config, "overrides": overrides, "attention": found}, arguments.out)
        return
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
    }
    write(summary, arguments.out)


def write(summary: dict, path: str) -> None:
    text = json.dumps(summary | versions(), indent=1)
    print(text)
    if path:
        Path(path).write_text(text + "\n")


if __name__ == "__main__":
    main()

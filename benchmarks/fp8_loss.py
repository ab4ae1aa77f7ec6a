"""The loss of training in FP8 beside bf16, from the same parameters and on the same text.

    PYTHONPATH=. python benchmarks/fp8_loss.py [--config=configs/proxy_300m.py] [--seconds 3000]
        [--variants bf16,fp8,coarse] [--out results.json] [--plot loss.png] [--config.FIELD=VALUE ...]

`coarse` is the control: one scale a tensor, and sums left to the tensor cores. Each variant runs in a
process of its own, all at once, until the configuration's steps or the seconds are over. The gap is that
of the losses smoothed over `WINDOW` steps, relative to bf16. With `--after FILE` the processes compile, and
start when the file exists. `--add FILE` takes the variants that are not run from earlier results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

VARIANTS = {
    "bf16": ["train.precision=bf16"],
    "fp8": ["train.precision=fp8"],
    "coarse": [
        "train.precision=fp8",
        "fp8.activation_scales=tensor",
        "fp8.weight_scales=tensor",
        "fp8.promotion=False",
    ],
}
WINDOW = 50
SYNC = 10  # Steps between looks at the clock.


def train(arguments, overrides) -> None:
    """Trains one variant and writes its losses."""
    import jax

    import train as trainer
    from benchmarks import timing
    from dsv3_jax.data import Loader
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training import loop
    from dsv3_jax.training.state import init_state
    from dsv3_jax.training.step import make_train_step

    fields = [f"--config.{field}" for field in VARIANTS[arguments.variant]]
    config, _ = trainer.parse([f"--config={arguments.config}", *overrides, *fields])
    mesh, sequences = make_mesh(config.mesh), config.train.batch_size
    tokens = sequences * config.train.seq_len
    process = dict(process_index=0, process_count=1)
    loader = Loader(
        config.data, split="train", seq_len=config.train.seq_len, seed=config.train.seed, **process
    )
    state = init_state(config, mesh)

    def inputs(step):
        batch, count = loop.put_batch(config, mesh, loader.take(sequences), sequences)
        return batch, count, loop.schedules_at(config, step, step * tokens)

    first = inputs(0)
    step_function = make_train_step(config, mesh).lower(state, *first).compile()
    while arguments.after and not Path(arguments.after).exists():
        time.sleep(0.1)
    losses, started = [], time.monotonic()
    for step in range(config.train.steps):
        state, metrics = step_function(state, *(inputs(step) if step else first))
        losses.append((metrics.losses.ce_loss, metrics.max_vio.mean()))
        if step % SYNC == 0:
            jax.block_until_ready(metrics)
            if time.monotonic() - started > arguments.seconds:
                break
    losses = [[float(x) for x in pair] for pair in losses]
    content = {"tokens_a_step": tokens, "losses": losses, "versions": timing.versions()}
    Path(arguments.out).write_text(json.dumps(content))


def smoothed(losses):
    """Means over the last `WINDOW` steps, from the first whole window on."""
    import numpy as np

    total = np.cumsum([0.0, *losses])
    return (total[WINDOW:] - total[:-WINDOW]) / WINDOW


def compare(runs: dict) -> dict:
    """Steps that all have, and for each variant its last smoothed loss and its gap to bf16."""
    steps = min(len(run["losses"]) for run in runs.values())
    curves = {name: smoothed([loss for loss, _ in run["losses"][:steps]]) for name, run in runs.items()}
    summary: dict = {"steps": steps, "window": WINDOW}
    for name, curve in curves.items():
        summary[name] = {"last_loss": float(curve[-1]), "last_max_vio": runs[name]["losses"][steps - 1][1]}
        if "bf16" in curves and name != "bf16":
            gap = curve / curves["bf16"] - 1
            late = gap[len(gap) // 2 :]
            summary[name] |= {
                "last_gap": float(gap[-1]),
                "largest_gap": float(abs(gap).max()),
                "mean_gap_second_half": float(late.mean()),
            }
    return summary


def plot(runs: dict, path: str) -> None:
    """The smoothed losses, and the relative gaps to bf16 below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = min(len(run["losses"]) for run in runs.values())
    curves = {name: smoothed([loss for loss, _ in run["losses"][:steps]]) for name, run in runs.items()}
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    for name, curve in curves.items():
        (line,) = above.plot(range(WINDOW, steps + 1), curve, label=name)
        if name != "bf16" and "bf16" in curves:
            gap = 100 * (curve / curves["bf16"] - 1)
            below.plot(range(WINDOW, steps + 1), gap, color=line.get_color())
    above.set_ylabel("loss, nats a token")
    below.set_ylabel("gap to bf16, %")
    below.set_xlabel(f"step (means over {WINDOW})")
    below.axhspan(-0.25, 0.25, alpha=0.15)
    above.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/proxy_300m.py")
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--variant", help="run this one, in this process")
    parser.add_argument("--after", default="")
    parser.add_argument("--add", default="")
    parser.add_argument("--out", default="benchmarks/results/fp8_loss.json")
    parser.add_argument("--plot", default="")
    arguments, overrides = parser.parse_known_args()
    if arguments.variant:
        return train(arguments, overrides)
    runs = json.loads(Path(arguments.add).read_text())["runs"] if arguments.add else {}
    started, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.variants.split(","):
            out = Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, *sys.argv[1:], f"--variant={name}", f"--out={out}"]
            environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            started[name] = subprocess.Popen(command, env=environment), out
        for name, (process, out) in started.items():
            if process.wait() == 0:
                runs[name] = json.loads(out.read_text())
            else:
                failed.append(name)
    content = {"config": arguments.config, "overrides": overrides, "summary": compare(runs), "runs": runs}
    Path(arguments.out).write_text(json.dumps(content) + "\n")
    print(json.dumps(content["summary"], indent=1))
    if arguments.plot:
        plot(runs, arguments.plot)
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    main()

"""How far the gradients of one step are from float32's: in bf16, in FP8, and with one scale a tensor.

    PYTHONPATH=. python benchmarks/fp8_gradients.py [--config=configs/proxy_300m.py] [--steps 0] [--leaves]
        [--variants bf16,fp8,coarse] [--out results.json] [--config.FIELD=VALUE ...]

All take the same batch from the same parameters: those at the start, or after some steps in float32. Printed
are the norm of the difference over the norm of float32's gradients, of all parameters or (`--leaves`) of each
by itself, and how long the gradients are along float32's: 1 is as long.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks import fp8_loss


def found(config, mesh, state, inputs) -> tuple[dict[str, np.ndarray], float]:
    """(gradients by name, float64; the loss) of one batch."""
    import jax

    from dsv3_jax.parallel.mesh import use_mesh
    from dsv3_jax.training.step import gradients

    batch, count, schedules = inputs
    with use_mesh(mesh):
        run = jax.jit(lambda state, batch: gradients(config, state, batch, count, schedules.mtp_weight))
        grads, losses, _ = jax.device_get(run(state, batch))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    arrays = {name: np.asarray(leaf, np.float64) for name, (_, leaf) in zip(names, leaves, strict=True)}
    return arrays, float(losses.ce_loss)


def beside(mine: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    """The error relative to the norm, and the length along `exact`."""
    size = sum(float((x**2).sum()) for x in exact.values())
    error = sum(float(((mine[name] - x) ** 2).sum()) for name, x in exact.items())
    along = sum(float((mine[name] * x).sum()) for name, x in exact.items())
    return {"error": (error / size) ** 0.5, "along": along / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--config", default="configs/proxy_300m.py")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--variants", default="bf16,fp8,coarse")
    parser.add_argument("--leaves", action="store_true")
    parser.add_argument("--out", default="")
    arguments, overrides = parser.parse_known_args()

    import train as trainer
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.training.state import init_state
    from dsv3_jax.training.step import make_train_step

    def parse(fields):
        flags = (f"--config.{field}" for field in fields)
        return trainer.parse([f"--config={arguments.config}", *overrides, *flags])[0]

    config = parse(["train.precision=fp32"])
    mesh, text = make_mesh(config.mesh), fp8_loss.Text(config)
    state: Any = init_state(config, mesh)
    step: Any = make_train_step(config, mesh)
    for i in range(arguments.steps):
        state, _ = step(state, *text.inputs(config, mesh, i))
    inputs = text.inputs(config, mesh, arguments.steps)
    exact, loss = found(config, mesh, state, inputs)
    rows: dict[str, Any] = {"fp32": {"loss": loss}}
    for name in arguments.variants.split(","):
        mine, loss = found(parse(fp8_loss.VARIANTS[name]), mesh, state, inputs)
        rows[name] = {"loss": loss} | beside(mine, exact)
        rows[name]["leaves"] = {leaf: beside({leaf: mine[leaf]}, {leaf: exact[leaf]}) for leaf in exact}
        error, along = rows[name]["error"], rows[name]["along"]
        print(f"{name}: loss {loss:.5f}, error {error:.4f}, along {along:.4f}", flush=True)
    if arguments.leaves:
        for leaf in exact:
            errors = (f"{row['leaves'][leaf]['error']:8.4f}" for row in rows.values() if "leaves" in row)
            print(f"{leaf:50}", *errors)
    if arguments.out:
        about = fp8_loss.described(arguments.config, overrides, text) | {"steps": arguments.steps}
        Path(arguments.out).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

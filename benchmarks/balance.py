"""Does the router bias balance a collapsed router? MaxVio of `configs/tiny.py` with the bias on and off.

    PYTHONPATH=. python benchmarks/balance.py [--speeds 0.02 0] [--steps 300]

The run starts skewed on purpose: every token's embedding shares a direction, and two of the experts of
each layer point along it, so that they win nearly all tokens. MaxVio (arXiv 2408.15664, eq 4) is global:
of the loads summed over all of the validation text, and over the last steps of the training text.
"""

import argparse
import time

import jax
import numpy as np

from configs.tiny import get_config
from dsv3_jax.config_checks import typed
from dsv3_jax.config_reading import override
from dsv3_jax.data import Loader
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import loop, schedules
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import make_train_step

WINNERS = 2


def skewed(state, strength=3.0):
    """The state with a router in which the first experts win: centroids along a direction of all tokens."""

    def skew(path, leaf):
        name = path[-1].key
        if name == "embedding":
            return leaf + leaf.std()
        if name == "centroids":  # After the norm the shared direction has length near sqrt(d).
            return leaf.at[..., :WINNERS].add(strength / leaf.shape[-2])
        return leaf

    return state._replace(params=jax.tree_util.tree_map_with_path(skew, state.params))


def violations(counts):
    """MaxVio of each row of expert counts."""
    return counts.max(-1) / counts.mean(-1) - 1


def run(speed, steps, every, overrides):
    """Trains with one bias speed; prints a line each `every` steps and returns the last one's figures."""
    tree = get_config()
    problems = override(tree, [*overrides, f"model.moe.bias_speed={speed}", f"train.steps={steps}"])
    config = typed(tree, problems)
    mesh, process = make_mesh(config.mesh), dict(process_index=0, process_count=1)
    loader = Loader(
        config.data, split="train", seq_len=config.train.seq_len, seed=config.train.seed, **process
    )
    train_step, evaluate = make_train_step(config, mesh), loop.make_evaluation(config, mesh, process)
    state = jax.jit(skewed, donate_argnums=0)(init_state(config, mesh))
    loss, counts = evaluate(state.params, state.router)
    print(f"speed {speed:g} step 0: validation MaxVio by layer {violations(counts).round(3)}", flush=True)
    tokens, recent, started = 0, [], time.perf_counter()
    for step in range(1, steps + 1):
        sequences = schedules.batch_size_at(config, tokens)
        batch, n_micro = loop.put_batch(config, mesh, loader.take(sequences), sequences)
        rates = loop.schedules_at(config, step - 1, tokens)
        state, metrics = train_step(state, batch, n_micro, rates)
        tokens += sequences * config.train.seq_len
        recent = [*recent[-every + 1 :], np.asarray(metrics.counts)]
        if step % every == 0 or step == steps:
            loss, counts = evaluate(state.params, state.router)
            held_out, trained = violations(counts), violations(np.sum(recent, axis=0))
            by_step = np.mean([violations(load) for load in recent])
            print(
                f"speed {speed:g} step {step}: validation loss {loss:.4f}, MaxVio by layer: held-out text "
                f"{held_out.round(3)}, last {len(recent)} steps {trained.round(3)}, one step {by_step:.3f}; "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    loader.close()
    return loss, held_out.max(), trained.max(), by_step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.02, 0.0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("overrides", nargs="*", help="FIELD=VALUE")
    arguments = parser.parse_args()
    rows = [(s, *run(s, arguments.steps, arguments.every, arguments.overrides)) for s in arguments.speeds]
    names = ("bias speed", "validation loss", "held-out text", "last steps", "one step")
    print(f"\nMaxVio of the worst layer, after {arguments.steps} steps (one step: the mean over layers)")
    for row in (
        names,
        *((f"{speed:g}", *(f"{figure:.3f}" for figure in figures)) for speed, *figures in rows),
    ):
        print("  ".join(f"{item:>15}" for item in row))


if __name__ == "__main__":
    main()

"""Speculation at batch 1 on a trained model: acceptance, and tokens a second beside plain decoding.

    python benchmarks/speculation.py --config=configs/proxy_300m.py [--config.train.steps=1000 ...]
    python benchmarks/speculation.py --checkpoint runs/proxy [--drafts 1] [--temperature 0 0.6] [--out FILE]

The model is that of a work directory of train.py, or one that is trained here for `train.steps` steps and not
kept. Both ways continue the same prompts in turns, in one loop on the device; prefill is not counted. At
temperature 0 the texts are the same but for ties within the rounding of bf16, after which all may differ.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.data import Loader, Tokenizer, load_tokenizer
from dsv3_jax.generation import Generator, SamplingParams, folders
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import loop
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import make_train_step

PROMPTS = ("import os\n\n\ndef main(args):\n", "class Node:\n", '    """Return the ', "for name in sorted(")


AHEAD = 20  # Steps that the host may be ahead of the device.


def trained(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(variables, what training came to)."""
    mesh, train = make_mesh(config.mesh), config.train
    loader = Loader(
        config.data, split="train", seq_len=train.seq_len, seed=train.seed, **loop.data_share(mesh)
    )
    state, step_function, losses = init_state(config, mesh), make_train_step(config, mesh), []
    began = time.perf_counter()
    for step in range(train.steps):
        batch, count = loop.put_batch(config, mesh, loader.take(train.batch_size), train.batch_size)
        schedules = loop.schedules_at(config, step, step * train.batch_size * train.seq_len)
        state, metrics = step_function(state, batch, count, schedules)
        losses.append(metrics.losses.ce_loss)
        if step >= AHEAD:
            losses[step - AHEAD].block_until_ready()
    last = float(statistics.fmean(map(float, losses[-AHEAD:])))
    loader.close()
    about = {"steps": train.steps, "tokens_a_step": train.batch_size * train.seq_len, "last_loss": last}
    print(f"trained in {time.perf_counter() - began:.0f} s: {about}", flush=True)
    return {"params": state.params, "router": state.router}, about


def compare(
    model: ModelConfig, variables: Any, tokenizer: Tokenizer, drafts: int, params: SamplingParams, rounds: int
) -> tuple[dict[str, Any], str]:
    """(a row of results, a text)."""
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    ways = {
        name: Generator(model, variables, tokenizer, dtype=dtype, speculate=count)
        for name, count in (("plain", 0), ("speculative", drafts))
    }
    with ThreadPoolExecutor(2) as pool:  # Both compile at once.
        list(pool.map(lambda way: way.generate([PROMPTS[0]], params), ways.values()))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {name: [] for name in ways}
    before = list(ways["speculative"].statistics.accepted), ways["speculative"].statistics.steps
    for _ in range(rounds):
        for prompt in PROMPTS:
            for name, way in ways.items():
                start = way.statistics.seconds
                (made,) = way.generate([prompt], params)
                rates[name].append((len(made.tokens) - 1) / (way.statistics.seconds - start))
                texts[name].append(made.text)
    after = ways["speculative"].statistics
    steps = after.steps - before[1]
    accepted = [(new - old) / steps for new, old in zip(after.accepted, before[0], strict=True)]
    median = {name: statistics.median(found) for name, found in rates.items()}
    row = {
        "drafts": drafts,
        "temperature": params.temperature,
        "tokens_per_second": median,
        "speed_up": median["speculative"] / median["plain"],
        "accepted_by_position": accepted,
        "same_texts": statistics.mean(a == b for a, b in zip(*texts.values(), strict=True)),
        "new_tokens": params.max_new_tokens,
    }
    return row, texts["speculative"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--checkpoint", help="a work directory of train.py; else a model is trained")
    parser.add_argument("--config", default="configs/proxy_300m.py")
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0])
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    arguments, overrides = parser.parse_known_args()
    about: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if arguments.checkpoint:
        loaded = folders.load(arguments.checkpoint)
        model, variables, tokenizer = loaded.config, loaded.variables, loaded.tokenizer
    else:
        import train as trainer

        config, _ = trainer.parse([f"--config={arguments.config}", *overrides])
        variables, about["training"] = trained(config)
        model, tokenizer = config.model, load_tokenizer(config.data.tokenizer)
        about |= {"config": arguments.config, "overrides": overrides}
    rows = []
    for temperature in arguments.temperature:
        params = SamplingParams(max_new_tokens=arguments.new, temperature=temperature, ignore_eos=True)
        row, text = compare(model, variables, tokenizer, arguments.drafts, params, arguments.rounds)
        rows.append(row)
        print(json.dumps(row, indent=1), repr(text[:300]), sep="\n", flush=True)
        if arguments.out:
            pathlib.Path(arguments.out).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

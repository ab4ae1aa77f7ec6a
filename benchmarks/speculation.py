"""Speculation on a trained model: acceptance, and tokens a second beside plain decoding.

    python benchmarks/speculation.py --config=configs/proxy_300m.py [--config.train.steps=1000 ...]
    python benchmarks/speculation.py --checkpoint runs/proxy [--drafts 1] [--batch 1 16]
        [--temperature 0 0.6] [--out FILE]

The model is that of a work directory of train.py, or one that is trained here for `train.steps` steps and not
kept. Both ways continue the same prompts in turns, in one loop on the device; prefill is not counted.

At temperature 0 the texts should be the same. Where some are not, all logits of plain decoding's texts are
computed again: by the forward in float32, decoding one token at a time, and two. That tells a near tie from a
fault.
"""

import argparse
import dataclasses
import functools
import itertools
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
import numpy as np

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.data import Loader, Tokenizer, load_tokenizer
from dsv3_jax.generation import Generator, SamplingParams, folders, forward
from dsv3_jax.generation.cache import init_cache
from dsv3_jax.generation.prefill import prefill
from dsv3_jax.generation.programs import FEW_ROWS, Program
from dsv3_jax.generation.weights import kernels_for
from dsv3_jax.model import Transformer
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import loop
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import make_train_step

PROMPTS = ("import os\n\n\ndef main(args):\n", "class Node:\n", '    """Return the ', "for name in sorted(")


def batches_of(size: int) -> list[list[str]]:
    """Batches to continue: each prompt alone, or one batch of as many different ones."""
    if size == 1:
        return [[prompt] for prompt in PROMPTS]
    return [[f"# {i}\n{PROMPTS[i % len(PROMPTS)]}" for i in range(size)]]


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
    model: ModelConfig,
    variables: Any,
    tokenizer: Tokenizer,
    drafts: int,
    params: SamplingParams,
    rounds: int,
    batch: int = 1,
) -> tuple[dict[str, Any], str]:
    """(a row of results, a text)."""
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    ways = {
        name: Generator(model, variables, tokenizer, dtype=dtype, speculate=count)
        for name, count in (("plain", 0), ("speculative", drafts))
    }
    batches = batches_of(batch)
    with ThreadPoolExecutor(2) as pool:  # Both compile at once.
        list(pool.map(lambda way: way.generate(batches[0], params), ways.values()))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[list[int]]] = {name: [] for name in ways}
    before = list(ways["speculative"].statistics.accepted), ways["speculative"].statistics.steps
    for _ in range(rounds):
        for prompts in batches:
            for name, way in ways.items():
                start = way.statistics.seconds
                made = way.generate(prompts, params)
                new = sum(len(text.tokens) - 1 for text in made)
                rates[name].append(new / (way.statistics.seconds - start))
                texts[name] += [text.tokens for text in made]
    after = ways["speculative"].statistics
    steps = after.steps - before[1]
    accepted = [(new - old) / steps for new, old in zip(after.accepted, before[0], strict=True)]
    median = {name: statistics.median(found) for name, found in rates.items()}
    row = {
        "batch": batch,
        "drafts": drafts,
        "temperature": params.temperature,
        "tokens_per_second": median,
        "speed_up": median["speculative"] / median["plain"],
        "accepted_by_position": accepted,
        "same_texts": statistics.mean(a == b for a, b in zip(*texts.values(), strict=True)),
        "new_tokens": params.max_new_tokens,
    }
    if batch == 1 and not params.temperature and row["same_texts"] < 1:  # Rounds repeat the texts.
        of_each = [found[: len(PROMPTS)] for found in texts.values()]
        row["against_float32"], row["partings"] = partings(model, variables, ways["plain"], of_each)
    return row, tokenizer.decode(texts["speculative"][0])


@functools.partial(jax.jit, static_argnames="config")
def _forward(variables, tokens, config):
    out = Transformer(config).apply(variables, tokens)
    return jnp.matmul(out.hidden[0], out.head, precision="highest")


def _logits(weights, cache, tokens, config):
    _, logits, cache = forward.decode(weights, cache, tokens, jnp.ones(1, bool), config)
    return logits[0], dataclasses.replace(cache, lengths=cache.lengths + tokens.shape[1])


decode_logits = Program(_logits, FEW_ROWS, donate="cache")


def logits_of(model: ModelConfig, variables: Any, way: Generator, text: list[int], read: int) -> dict:
    """Logits [len(text) - read, vocab] from the token `read` on: the forward's, and those of decoding `text`.

    Decoding two tokens at a time gives those of every token once as the first and once as the second.
    """
    exact = dataclasses.replace(
        model,
        attention=dataclasses.replace(model.attention, implementation="reference"),
        moe=dataclasses.replace(model.moe, implementation="reference"),
    )
    tokens = np.asarray(text, np.int32)[None]
    found = {}
    with jax.default_matmul_precision("highest"):
        found["float32"] = np.asarray(_forward(variables, tokens, exact))[read:]
    shape = len(text) - read, model.vocab_size
    names = "one", "first of two", "second of two"
    found |= {name: np.full(shape, np.nan, np.float32) for name in names}
    for width, start in ((1, read), (2, read), (2, read + 1)):
        cache = init_cache(model, 1, len(text), way.cache_dtype)
        lengths = np.array([start], np.int32)
        cache, _ = prefill(way.weights, cache, tokens[:, :start], lengths, model, chunk=way.chunk, drafts=0)
        for at in range(start, len(text) - width + 1, width):
            with kernels_for(way.weights):
                logits, cache = decode_logits.of(model)(way.weights, cache, tokens[:, at : at + width], model)
            for i, name in enumerate(names[:1] if width == 1 else names[1:]):
                found[name][at + i - read] = logits[i]
    return found


def partings(
    model: ModelConfig, variables: Any, way: Generator, texts: list[list[list[int]]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(errors of the logits of all tokens, where two texts of a prompt part): both against float32.

    `texts` are those of plain decoding and of speculation, by prompt.
    """
    errors: dict[str, list[float]] = {}
    missed: dict[str, list[float]] = {}
    places = []
    for prompt, plain, other in zip(PROMPTS, *texts, strict=True):
        start = way.encode(prompt).tolist()
        logits = logits_of(model, variables, way, [*start, *plain], len(start) - 1)
        true = logits["float32"]
        for name, found in logits.items():
            if name != "float32":
                known = np.isfinite(found[:, 0])
                errors.setdefault(name, []).extend(abs(found - true)[known].max(-1))
                chosen = found[known].argmax(-1)
                gap = true[known].max(-1) - np.take_along_axis(true[known], chosen[:, None], -1)[:, 0]
                missed.setdefault(name, []).extend(gap[gap > 0])
        if plain != other:
            n = next(i for i, (a, b) in enumerate(zip(plain, other, strict=True)) if a != b)
            ranks = np.argsort(np.argsort(-true[n]))
            of = {name: float(x[n, plain[n]] - x[n, other[n]]) for name, x in logits.items()}
            place = {"prompt": prompt, "new_token": n, "ranks": [int(ranks[t[n]]) for t in (plain, other)]}
            places.append(place | {"plain_less_speculative": of})
    summary = {
        name: {
            "logits": len(found),
            "median_error": float(np.median(found)),
            "largest_error": float(max(found)),
            "other_choices": len(missed[name]),
            "largest_gap_of_these": float(max(missed[name], default=0.0)),
        }
        for name, found in errors.items()
    }
    return summary, places


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--checkpoint", help="a work directory of train.py; else a model is trained")
    parser.add_argument("--config", default="configs/proxy_300m.py")
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="*", default=[1])
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
    for temperature, batch in itertools.product(arguments.temperature, arguments.batch):
        params = SamplingParams(max_new_tokens=arguments.new, temperature=temperature, ignore_eos=True)
        row, text = compare(model, variables, tokenizer, arguments.drafts, params, arguments.rounds, batch)
        rows.append(row)
        print(json.dumps(row, indent=1), repr(text[:300]), sep="\n", flush=True)
        if arguments.out:
            pathlib.Path(arguments.out).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

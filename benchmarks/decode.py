"""Tokens a second of greedy generation on CPU, beside transformers' `generate` on the same weights.

    python benchmarks/decode.py [--shape tiny small] [--out results.json]
    python benchmarks/decode.py --context 1024 4096 16384     # cost by the cache's length
    python benchmarks/decode_gpu.py                              # on a GPU

Both complete the same prompts, prefill included, in float32 with the same threads, taking turns; the texts
must be the same, token by token. The peer's best way to run its experts is searched in the same run. The
router of both has no bias, and MTP is off: the peer has neither. `--context` measures one step of ours at
several lengths of a cache whose capacity stays the same.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
import warnings
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import cpu
from benchmarks.peer import Peer
from benchmarks.train_cpu import SHAPES, random_batch, run_config
from dsv3_jax.config import ModelConfig
from dsv3_jax.generation import Generator, SamplingParams
from dsv3_jax.generation.cache import init_cache
from dsv3_jax.generation.decode import DecodeState
from dsv3_jax.generation.generator import decode_step
from dsv3_jax.generation.sampling import make_sampler
from dsv3_jax.generation.weights import prepare
from dsv3_jax.model import Transformer, init_variables

PROMPT, NEW = 32, 128
EXPERTS = ("grouped_mm", "batched_mm", "eager")


def make_variables(config: ModelConfig) -> Any:
    """Random parameters, no router bias."""
    from flax.core import meta

    rng = jax.random.key(0)
    return meta.unbox(jax.jit(lambda key: init_variables(Transformer(config), key))(rng))


def theirs(model: Any, prompts: np.ndarray) -> np.ndarray:
    """The tokens that transformers' `generate` appends."""
    with torch.no_grad():
        ids = torch.from_numpy(prompts).long()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
    return out[:, prompts.shape[1] :].numpy()


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """One row: tokens a second of both, and their ratio."""
    model = dataclasses.replace(SHAPES[name][0], max_seq_len=1024)
    variables = make_variables(model)
    generator = Generator(model, variables)
    params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
    prompts = np.random.default_rng(1).integers(0, model.vocab_size, (batch, PROMPT)).astype(np.int32)
    rows = [row.tolist() for row in prompts]

    def ours() -> np.ndarray:
        return np.array([completion.tokens for completion in generator.generate(rows, params)])

    expected, best, seconds = ours(), None, float("inf")
    config, tokens = run_config(model, 1, 8), random_batch(model.vocab_size, 1, 8)
    for experts in EXPERTS:
        peer = Peer(config, variables["params"], tokens, experts).model.eval()
        found = theirs(peer, prompts)
        # A tie within rounding may turn a text; then all that follows differs.
        same = (found == expected).all(1).mean()
        if same < 0.9:
            raise RuntimeError(f"{experts}: only {same:.0%} of the texts are the same")
        start = time.perf_counter()
        theirs(peer, prompts)
        if time.perf_counter() - start < seconds:
            best, seconds = (experts, peer), time.perf_counter() - start
    assert best is not None
    times = cpu.alternate({"ours": ours, "theirs": lambda: theirs(best[1], prompts)}, rounds=rounds)
    row = {"shape": name, "batch": batch, "experts": best[0]}
    row |= {f"{who}_tokens_per_second": batch * NEW / times[who].wall for who in times}
    ratios = {"ratio": times["theirs"].wall / times["ours"].wall}
    return row | ratios | {"ratio_cpu_seconds": times["theirs"].cpu / times["ours"].cpu}


def by_length(lengths: list[int], capacity: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a step at batch 1, by how much of the cache is in use."""
    model = dataclasses.replace(SHAPES["small"][0], max_seq_len=capacity)
    weights = jax.jit(prepare, static_argnums=1)(make_variables(model), model)
    out = []
    for length in lengths:
        cache = init_cache(model, 1, capacity, "fp32")
        state = DecodeState(
            dataclasses.replace(cache, lengths=jnp.full(1, length - 100, jnp.int32)),
            jnp.ones((1, 1), jnp.int32),
            jnp.zeros((1, 0, model.d_model)),
            jnp.zeros((1, 0), bool),
            make_sampler([SamplingParams(temperature=0.0, ignore_eos=True)], -1),
            jnp.full(1, 10**6, jnp.int32),
            jnp.ones(1, bool),
        )
        times = []
        for _ in range(5 + rounds):
            start = time.perf_counter()
            state, emitted = decode_step.of(model)(weights, state, model)
            jax.block_until_ready(emitted)
            times.append(time.perf_counter() - start)
        out.append(
            {"length": length, "capacity": capacity, "milliseconds": 1e3 * float(np.median(times[5:]))}
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["tiny", "small"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--context", nargs="*", type=int, default=[], help="cache lengths; instead of shapes")
    parser.add_argument("--capacity", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    if arguments.context:
        rows = by_length(arguments.context, arguments.capacity, 10 * arguments.rounds)
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    else:
        for name in arguments.shape:
            for batch in arguments.batch:
                rows.append(measure(name, batch, arguments.rounds))
                print(
                    "  ".join(
                        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()
                    )
                )
    if arguments.out:
        cpu.write(arguments.out, rows, prompt=PROMPT, new_tokens=NEW)


if __name__ == "__main__":
    main()

"""Speculation at batch 1 on a trained model: acceptance, and tokens a second beside plain decoding.

    python train.py --config=configs/proxy_300m.py --workdir=runs/proxy --config.train.steps=400
    python benchmarks/speculation.py --checkpoint runs/proxy [--drafts 1] [--temperature 0] [--out FILE]

Both ways continue the same prompts in turns, in one loop on the device; prefill is not counted. At
temperature 0 the texts are the same but for ties within the rounding of bf16, after which all may differ.
"""

import argparse
import json
import pathlib
import statistics
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from dsv3_jax.generation import Generator, SamplingParams, folders

PROMPTS = ("import os\n\n\ndef main(args):\n", "class Node:\n", '    """Return the ', "for name in sorted(")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a work directory of train.py")
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    loaded = folders.load(arguments.checkpoint)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    params = SamplingParams(max_new_tokens=arguments.new, temperature=arguments.temperature, ignore_eos=True)
    ways = {
        name: Generator(loaded.config, loaded.variables, loaded.tokenizer, dtype=dtype, speculate=drafts)
        for name, drafts in (("plain", 0), ("speculative", arguments.drafts))
    }
    # Both compile at once.
    threads = [threading.Thread(target=way.generate, args=([PROMPTS[0]], params)) for way in ways.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {name: [] for name in ways}
    before = list(ways["speculative"].statistics.accepted), ways["speculative"].statistics.steps
    for _ in range(arguments.rounds):
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
    same = statistics.mean(a == b for a, b in zip(*texts.values(), strict=True))
    row = {
        "tokens_per_second": median,
        "speed_up": median["speculative"] / median["plain"],
        "accepted_by_position": accepted,
        "same_texts": same,
        "temperature": arguments.temperature,
        "new_tokens": arguments.new,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(row, indent=1))
    print(repr(texts["speculative"][0][:300]))
    if arguments.out:
        pathlib.Path(arguments.out).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()

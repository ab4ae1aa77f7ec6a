"""Tokens a second of transformers' DeepSeek-V3 decoding on one GPU: the rival of `benchmarks/decode_gpu.py`.

    python benchmarks/decode_gpu_peer.py [--batch 1 32] [--context 4096] --out peer.json [--wait FILE]

`configs/small_gpu.py` in bf16 with random weights, `generate` after a prompt as long as the context. At
batch 1 the cache is static and the model compiled by transformers itself, its fastest way found here; larger
batches use the default cache. A step is the median time between two tokens, which `generate` reads singly.
`--wait` compiles and warms up, says so in FILE.ready, and measures once FILE exists: nothing else should run
then.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
import transformers

from benchmarks.peer import deepseek_config
from configs import small_gpu
from dsv3_jax.config_checks import typed

NEW, SKIPPED = 64, 8  # The first steps are not counted: transformers compiles and records them.


def make_model(room: int):
    """The model on the GPU; its weights are transformers' random ones."""
    config = dataclasses.replace(typed(small_gpu.get_config()).model, max_seq_len=room)
    shape = deepseek_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.DeepseekV3ForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False), config.vocab_size


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model, prompts, static: bool) -> float:
    """Median seconds of a step."""
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    clock = Clock()
    if (
        len(prompts) == 1
    ):  # A streamer takes no batch; there the steps are timed by a processor of the logits.
        options["streamer"] = clock
    else:
        options["logits_processor"] = [lambda ids, scores: (clock.put(None), scores)[1]]
    with torch.no_grad():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    assert out.shape[1] == prompts.shape[1] + NEW
    steps = [b - a for a, b in itertools.pairwise(clock.times)][SKIPPED:]
    return statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--out", required=True)
    parser.add_argument("--wait")
    arguments = parser.parse_args()
    began = time.perf_counter()
    model, vocab = make_model(arguments.context + NEW + 1)
    print(f"model made ({time.perf_counter() - began:.0f} s)", flush=True)
    rows = []

    def prompts(batch: int):
        return torch.randint(0, vocab, (batch, arguments.context), device="cuda")

    static = {batch: batch == 1 for batch in arguments.batch}
    for batch in list(arguments.batch):
        try:
            generate(model, prompts(batch), static[batch])
        except torch.OutOfMemoryError as error:
            print(f"batch {batch}: {error}", flush=True)
            arguments.batch.remove(batch)
            continue
        print(f"batch {batch} warm ({time.perf_counter() - began:.0f} s)", flush=True)
    if arguments.wait:
        pathlib.Path(arguments.wait + ".ready").touch()
        while not pathlib.Path(arguments.wait).exists():
            time.sleep(0.2)
    for batch in arguments.batch:
        step = min(generate(model, prompts(batch), static[batch]) for _ in range(2))
        row = {"batch": batch, "static_cache_compiled": static[batch], "milliseconds": 1e3 * step}
        rows.append(row | {"tokens_per_second": batch / step})
        print(rows[-1], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    pathlib.Path(arguments.out).write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

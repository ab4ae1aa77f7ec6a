"""Tokens a second of decoding on one GPU, and the fraction of what reading its memory allows.

    python benchmarks/decode_gpu.py [--batch 1 32 128] [--context 4096] [--peer] [--profile] [--out FILE]

The model is `configs/small_gpu.py` in bf16 with random weights, the cache is full of random entries up to
the context, and greedy steps run in one loop on the device. Reading the first tokens of as many prompts is
timed, too. First a cut-down model of the same widths is checked: the logits of prefill and decoding, with the
kernels that "auto" chooses, against the training forward in float32.

The floor of a step is its bytes over the rate of a device-to-device copy, measured in the same run: the
weights that the batch touches (of the experts, those that so many uniform choices hit) and the cache in use.
`--options` measures again with other options of the compiler. `--profile` lists the kernels of a step.
`--peer` runs `benchmarks/decode_gpu_peer.py` (transformers) beside: both compile at once, and measure one
after the other; on the next GPU where there is one, else without batches for whose cache there is no room
beside ours. `--unchecked` leaves the check out.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import timing  # noqa: I001  First: it turns off JAX's preallocation.

import jax
import jax.numpy as jnp
import numpy as np

from configs import small_gpu
from dsv3_jax.config import ModelConfig
from dsv3_jax.config_checks import typed
from dsv3_jax.generation import SamplingParams, forward
from dsv3_jax.generation.cache import LatentCache, bytes_per_token, init_cache
from dsv3_jax.generation.decode import DecodeState
from dsv3_jax.generation.generator import decode_run
from dsv3_jax.generation.prefill import prefill, prefill_chunk
from dsv3_jax.generation.programs import AS_WRITTEN
from dsv3_jax.generation.sampling import make_sampler
from dsv3_jax.generation.weights import Weights, prepare
from dsv3_jax.model import Transformer, init_variables
from pallas_kernels import implementations

NEW = 128
CHUNK = 512
# bf16 rounds to 2^-9; two layers and a head of them leave below 1e-2. A wrong product leaves far more.
TOLERANCE = 2e-2


def model_config(room: int) -> ModelConfig:
    return dataclasses.replace(typed(small_gpu.get_config()).model, max_seq_len=room)


def check(config: ModelConfig) -> dict[str, float]:
    """Median over positions of the logits' relative error: prefill, decoding by one and by two tokens."""
    config = dataclasses.replace(config, n_layers=2, max_seq_len=256)
    rng = np.random.default_rng(0)
    text = rng.integers(0, config.vocab_size, (1, 96)).astype(np.int32)
    variables = jax.jit(lambda key: init_variables(Transformer(config), key))(jax.random.key(0))
    out = jax.jit(lambda v, t: Transformer(config).apply(v, t))(variables, text)
    expected = np.asarray(jnp.matmul(out.hidden[0], out.head, precision="highest"))
    weights = jax.jit(prepare, static_argnums=(1, 2))(variables, config, jnp.dtype(jnp.bfloat16))
    step = jax.jit(forward.decode, static_argnames="config", compiler_options=AS_WRITTEN)
    top = jax.jit(forward.head)

    def error(found: Any, at: slice) -> float:
        difference = np.asarray(found, np.float32) - expected[at]
        return float(np.median(np.sqrt((difference**2).mean(-1) / (expected[at] ** 2).mean(-1))))

    cache = init_cache(config, 1, 256, "bf16")
    start = 64
    cache, last = prefill(
        weights, cache, text[:, :start], np.array([start], np.int32), config, chunk=64, drafts=0
    )
    errors = {"prefill": error(top(weights, last[:, -1]), slice(start - 1, start))}
    for width in (1, 2):
        found, at = [], start
        for _ in range(8):
            _, new, cache = step(weights, cache, text[:, at : at + width], np.ones(1, bool), config)
            cache = dataclasses.replace(cache, lengths=cache.lengths + width)
            found.append(new[0])
            at += width
        errors[f"decode by {width}"] = error(np.concatenate(found), slice(start, at))
        start = at
    wrong = {name: value for name, value in errors.items() if not value < TOLERANCE}
    if wrong:
        raise RuntimeError(f"logits differ from the forward's by {wrong}")
    return errors


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def _random(key, shape, dtype, scale):
    return (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(dtype)


def random_weights(config: ModelConfig) -> Weights:
    """Weights of the shapes that `prepare` gives, without the float32 originals."""
    shapes = jax.eval_shape(
        lambda key: prepare(init_variables(Transformer(config), key), config, jnp.bfloat16), jax.random.key(0)
    )
    leaves, tree = jax.tree.flatten(shapes)
    made = []
    for i, leaf in enumerate(leaves):
        if leaf.ndim == 1:  # Norms are ones, the router's bias zeros.
            made.append(jnp.full(leaf.shape, leaf.shape[0] != config.moe.n_experts, leaf.dtype))
        else:
            made.append(_random(jax.random.key(i), leaf.shape, leaf.dtype, 0.02))
    return tree.unflatten(made)


def make_state(config: ModelConfig, batch: int, context: int) -> DecodeState:
    """A batch whose cache holds `context` random tokens of each sequence."""
    empty = jax.eval_shape(lambda: init_cache(config, batch, context + NEW, "bf16"))
    leaves, tree = jax.tree.flatten(empty.layers)
    layers = tree.unflatten([_random(jax.random.key(i), x.shape, x.dtype, 1.0) for i, x in enumerate(leaves)])
    return DecodeState(
        LatentCache(layers, jnp.full(batch, context, jnp.int32), None, 1),
        jnp.ones((batch, 1), jnp.int32),
        jnp.zeros((batch, 0, config.d_model), jnp.bfloat16),
        jnp.zeros((batch, 0), bool),
        make_sampler([SamplingParams(temperature=0.0, ignore_eos=True)] * batch, -1),
        jnp.full(batch, NEW, jnp.int32),
        jnp.ones(batch, bool),
        greedy=True,
    )


def again(state: DecodeState, context: int, steps: int) -> DecodeState:
    """The state as before its steps: what they wrote lies beyond the lengths."""
    batch = len(state.left)
    cache = dataclasses.replace(state.cache, lengths=jnp.full(batch, context, jnp.int32))
    return dataclasses.replace(
        state, cache=cache, left=jnp.full(batch, steps, jnp.int32), active=jnp.ones(batch, bool)
    )


def step_bytes(weights: Weights, config: ModelConfig, batch: int, context: float) -> dict[str, float]:
    """Bytes that a step must read."""
    m, experts, others = config.moe, 0, 0
    for layer in weights.layers:
        for name, leaf in [(n, x) for part in layer.values() for n, x in _named(part)]:
            if "moe" in layer and name in ("gate_up", "down"):
                one = _bytes(leaf) / leaf.shape[0]
                hit = m.n_experts * (1 - (1 - m.top_k / m.n_experts) ** batch)
                experts += one * (hit + m.n_shared)
            else:
                others += _bytes(leaf)
    return {
        "experts": experts,
        "other_weights": others + _bytes(weights.head),
        "cache": batch * context * bytes_per_token(config, "bf16"),
    }


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _named(part: Any) -> list[tuple[str, Any]]:
    return list(part.items()) if isinstance(part, dict) else [("", part)]


def profile(call: Any, steps: int) -> list[dict[str, Any]]:
    """The kernels of a step: name, how many, microseconds in all."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, seconds in timing.kernels(call):
        found[name.split("(")[0][:90]].append(seconds)
    rows = [
        {"kernel": name, "count": len(all_) / steps, "us": sum(all_) * 1e6 / steps}
        for name, all_ in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def compiled(config: ModelConfig, weights: Weights, state: DecodeState, options: Any = None) -> Any:
    with implementations.one_device():
        return decode_run.of(config).lower(weights, state, config, NEW).compile(compiler_options=options)


def measure(
    program: Any, weights: Weights, state: DecodeState, context: int, rounds: int
) -> tuple[float, Any]:
    """(median seconds of a step, the state for more)."""
    times = []
    for _ in range(rounds + 1):
        state = again(state, context, NEW)
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, texts = program(weights, state)
        jax.block_until_ready(texts)
        times.append((time.perf_counter() - start) / NEW)
    return statistics.median(times[1:]), state


def prefill_inputs(config: ModelConfig, batch: int) -> tuple[Any, ...]:
    """What the chunk that is timed takes after the weights: the first `CHUNK` tokens of prompts."""
    cache = init_cache(config, batch, CHUNK, "bf16")
    kept = jnp.zeros((batch, 1, config.d_model), jnp.bfloat16)
    tokens = jnp.ones((batch, CHUNK), jnp.int32)
    return cache, kept, tokens, jnp.int32(0), jnp.full(batch, CHUNK, jnp.int32)


def compiled_prefill(config: ModelConfig, weights: Weights, batch: int, options: Any = None) -> Any:
    inputs = jax.eval_shape(lambda: prefill_inputs(config, batch))
    with implementations.one_device():
        lowered = prefill_chunk.of(config).lower(weights, *inputs, config, CHUNK, 0)
        return lowered.compile(compiler_options=options)


def prefill_seconds(program: Any, weights: Weights, config: ModelConfig, batch: int, rounds: int) -> float:
    """Median seconds of reading `CHUNK` tokens of each sequence."""
    (cache, kept, *inputs), times = prefill_inputs(config, batch), []
    for _ in range(rounds + 1):
        jax.block_until_ready((cache, kept, inputs))
        start = time.perf_counter()
        cache, kept = program(weights, cache, kept, *inputs)
        jax.block_until_ready((cache, kept))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Peer:
    """transformers in a process of its own, which measures when it is told to."""

    def __init__(self, batches: list[int], context: int):
        self._folder = pathlib.Path(tempfile.mkdtemp())
        self._go, self._out = self._folder / "go", self._folder / "out.json"
        script = str(pathlib.Path(__file__).with_name("decode_gpu_peer.py"))
        other = len(jax.devices()) > 1
        environment = dict(os.environ)
        if other:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = seen[1]
        # Its cache of 128 texts is 64 GB.
        sizes = [str(batch) for batch in batches if other or batch <= 32]
        command = [sys.executable, script, "--batch", *sizes, "--context", str(context)]
        command += ["--out", str(self._out), "--wait", str(self._go)]
        self._process = subprocess.Popen(command, env=environment)

    def ready(self) -> None:
        """Waits until it has compiled, or has failed."""
        while not pathlib.Path(f"{self._go}.ready").exists() and self._process.poll() is None:
            time.sleep(0.2)

    def results(self) -> list[dict[str, Any]]:
        """Its rows; none if it has failed."""
        self._go.touch()
        if self._process.wait():
            return []
        return json.loads(self._out.read_text())["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 32, 128])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--options", action="append", default=[], help="other compiler options to try, as JSON"
    )
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    context, began = arguments.context, time.perf_counter()
    config = model_config(context + NEW)
    peer = Peer(arguments.batch, context) if arguments.peer else None
    with implementations.one_device():
        errors = {} if arguments.unchecked else check(config)
    print(f"logits against the forward: {errors} ({time.perf_counter() - began:.0f} s)", flush=True)
    weights = random_weights(config)
    shapes = {
        batch: jax.eval_shape(lambda b=batch: make_state(config, b, context)) for batch in arguments.batch
    }
    tried = [None, *map(json.loads, arguments.options)]
    jobs = [(batch, options) for batch in arguments.batch for options in tried]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # The compiler leaves Python's lock.
        programs = [pool.submit(compiled, config, weights, shapes[batch], options) for batch, options in jobs]
        prefills = [pool.submit(compiled_prefill, config, weights, *job) for job in jobs]
    copy = timing.roofline().copy_tbps * 1e12
    print(f"copy {copy / 1e12:.2f} TB/s; compiled ({time.perf_counter() - began:.0f} s)", flush=True)
    if peer is not None:
        peer.ready()
        print(f"transformers is ready ({time.perf_counter() - began:.0f} s)", flush=True)
    rows = []
    for (batch, options), job, reading in zip(jobs, programs, prefills, strict=True):
        if error := job.exception() or reading.exception():
            print(f"batch {batch} {options}: {str(error)[:300]}")
            continue
        program, state = job.result(), make_state(config, batch, context)
        seconds, state = measure(program, weights, state, context, arguments.rounds)
        prompts = prefill_seconds(reading.result(), weights, config, batch, arguments.rounds)
        bytes_ = step_bytes(weights, config, batch, context + NEW / 2)
        floor = sum(bytes_.values()) / copy
        row: dict[str, Any] = {"batch": batch, "context": context, "options": options, "bytes": bytes_}
        row |= {
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": batch / seconds,
            "roofline": floor / seconds,
            "prefill_milliseconds": 1e3 * prompts,
        }
        rows.append(row)
        print(
            f"batch {batch} {options or ''}: {1e3 * seconds:.3f} ms a step, {batch / seconds:.0f} tokens/s, "
            f"{floor / seconds:.1%} of the rate of {1e3 * floor:.3f} ms; {1e3 * prompts:.2f} ms"
            f" to read {CHUNK} tokens each",
            flush=True,
        )
        if arguments.profile and options is None:
            steps = 16
            state = again(state, context, steps)
            row["kernels"] = profile(lambda p=program, s=state: jax.block_until_ready(p(weights, s)), steps)
            total = sum(kernel["us"] for kernel in row["kernels"])
            print(f"kernels {total:.0f} us, {sum(kernel['count'] for kernel in row['kernels']):.0f} a step")
            for kernel in row["kernels"][:40]:
                print(f"  {kernel['us']:8.1f} us {kernel['count']:6.1f} x {kernel['kernel']}")
        del state
    for found in peer.results() if peer is not None else ():
        for row in rows:
            if row["batch"] == found["batch"]:
                row |= {"peer": found, "ratio": row["tokens_per_second"] / found["tokens_per_second"]}
                print(f"batch {row['batch']} {row['options'] or ''}: {row['ratio']:.2f} times {found}")
    if arguments.out:
        details = {"versions": timing.versions(), "copy_tbps": copy / 1e12, "check": errors, "rows": rows}
        pathlib.Path(arguments.out).write_text(json.dumps(details, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tokens a second of a training step on CPU, beside the DeepSeek-V3 of Hugging Face transformers.

    PYTHONPATH=. python benchmarks/train_cpu.py [--shape tiny] [--rounds 10] [--compile] [--out results.json]

A step is forward, backward, clipping and AdamW, in float32 on the same tokens with the same threads.
Parameters are copied to the peer, and both must agree: the loss, the norm of the gradient, and the loss
after two optimizer steps. The peer has no multi-token prediction and no balance loss, so both are off;
its best options on this machine are searched in the same run (experts, attention and, with `--compile`,
torch.compile, which takes minutes). Both share one process and so one allocator: freed memory is kept.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import cpu
from benchmarks.peer import Peer
from dsv3_jax.config import (
    AttentionConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.host_memory import keep_freed_memory
from dsv3_jax.training.state import TrainState, init_state, parameter_count
from dsv3_jax.training.step import Schedules, make_train_step

LEARNING_RATE = 1e-3
# Two float32 programs add in other orders: about 1e-6 relative on a mean of thousands of terms, and the
# gradient's norm sums their squares. A wrong formula moves either by far more than 1e-4.
TOLERANCE = 1e-4

TINY = ModelConfig(
    vocab_size=264,
    d_model=128,
    n_layers=3,
    d_ff=256,
    init_std=0.05,
    attention=AttentionConfig(
        n_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    moe=MoEConfig(
        n_experts=16,
        top_k=2,
        d_ff_expert=96,
        n_groups=4,
        topk_groups=2,
        routed_scale=2.0,
        sequence_loss=0.0,
    ),
)
SMALL = ModelConfig(
    vocab_size=4096,
    d_model=256,
    n_layers=4,
    d_ff=768,
    init_std=0.03,
    attention=AttentionConfig(
        n_heads=8,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    moe=MoEConfig(
        n_experts=32,
        top_k=4,
        d_ff_expert=128,
        n_groups=4,
        topk_groups=2,
        routed_scale=2.5,
        sequence_loss=0.0,
    ),
)
# model, sequences a step, positions a sequence
SHAPES = {
    "tiny": (TINY, 8, 256),  # The dimensions of configs/tiny.py.
    "small": (SMALL, 8, 256),
    "long": (TINY, 2, 1024),
}
# How transformers can run its experts and attention on CPU.
OPTIONS = [
    (experts, attention, compiled)
    for compiled in (False, True)
    for experts in ("grouped_mm", "batched_mm", "eager")
    for attention in ("sdpa", "eager")
    # Gathers the weights of every token's experts: 7 CPU seconds a tiny step where others take 2.
    if experts != "batched_mm" or attention == "sdpa" and not compiled
]


def run_config(model: ModelConfig, batch: int, seq: int) -> Config:
    """A run of `model` in float32 on one device."""
    return Config(
        model=model,
        optimizer=OptimizerConfig(peak_lr=LEARNING_RATE),
        train=TrainConfig(seq_len=seq, batch_size=batch, precision="fp32"),
        mesh=MeshConfig(data=1),
    )


def random_batch(vocab: int, batch: int, seq: int) -> dict[str, np.ndarray]:
    """One micro-batch [1, batch, seq] of random tokens."""
    tokens = np.random.default_rng(0).integers(0, vocab, (batch, seq + 1)).astype(np.int32)
    return {
        "tokens": tokens[None, :, :-1],
        "targets": tokens[None, :, 1:],
        "positions": np.broadcast_to(np.arange(seq, dtype=np.int32), (1, batch, seq)).copy(),
        "segment_ids": np.ones((1, batch, seq), np.int32),
        "loss_mask": np.ones((1, batch, seq), bool),
    }


class Ours:
    """Our training step: `step()` returns (loss, gradient norm)."""

    def __init__(self, config: Config, batch: dict[str, np.ndarray]):
        mesh = make_mesh(config.mesh)
        self.state: TrainState = init_state(config, mesh)
        self.batch = jax.tree.map(jnp.asarray, batch)
        self._step = make_train_step(config, mesh)
        # The router bias is updated by zero: the peer never moves it, and routing must stay the same.
        self._schedules = Schedules(LEARNING_RATE, 0.0, 0.0)

    def step(self) -> tuple[float, float]:
        self.state, metrics = self._step(self.state, self.batch, 1, self._schedules)
        return float(metrics.losses.loss), float(metrics.grad_norm)


def check(ours: Ours, peer: Peer) -> dict[str, Any]:
    """Runs three steps of both; raises RuntimeError unless losses and gradient norms agree."""
    found = []
    for number in range(3):
        for what, mine, theirs in zip(("loss", "grad_norm"), ours.step(), peer.step(), strict=True):
            difference = abs(mine - theirs) / abs(theirs)
            found.append({"step": number + 1, "what": what, "ours": mine, "peer": theirs})
            # Later norms follow a change of routing: a token whose two best experts tie in float32.
            if not difference < TOLERANCE and (number == 0 or what == "loss"):
                raise RuntimeError(f"step {number + 1}: {what} {mine} here, {theirs} in transformers")
    return {"tolerance": TOLERANCE, "values": found}


def best_peer(
    make: Callable[..., Peer], options: list[tuple[str, str, bool]], calls: int
) -> tuple[tuple[str, str, bool], dict[str, Any]]:
    """The fastest of the peer's options by median wall time, and the figures of all."""
    trials: dict[tuple[str, str, bool], Peer] = {}
    failed: dict[str, str] = {}
    for option in options:
        peer = make(*option)
        try:
            peer.step()
        except Exception as error:  # An option that this torch cannot run on CPU is no rival.
            failed[" ".join(map(str, option))] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        trials[option] = peer
    found = cpu.alternate({str(o): p.step for o, p in trials.items()}, rounds=calls)
    best = min(trials, key=lambda option: found[str(option)].wall)
    names = {o: f"experts {o[0]}, attention {o[1]}, {'compiled' if o[2] else 'not compiled'}" for o in trials}
    return best, {names[o]: found[str(o)]._asdict() for o in trials} | {"failed": failed}


def measure(name: str, rounds: int, options: list[tuple[str, str, bool]]) -> dict[str, Any]:
    """One row of results: the check, the peer's options, and both rivals' medians."""
    model, batch_size, seq = SHAPES[name]
    config = run_config(model, batch_size, seq)
    batch = random_batch(model.vocab_size, batch_size, seq)
    ours = Ours(config, batch)
    start = jax.tree.map(np.array, ours.state.params)  # A copy: the step overwrites the state.

    def peer_like(*option: Any) -> Peer:
        return Peer(config, start, batch, *option)

    checked = check(ours, peer_like())
    best, tried = options[0], {}
    if len(options) > 1:
        best, tried = best_peer(peer_like, options, max(3, rounds // 3))
    times = cpu.alternate(
        {"ours": ours.step, "peer": peer_like(*best).step}, rounds=rounds, calls=2, warmups=2
    )
    tokens = batch_size * seq
    return {
        "shape": name,
        "model": dataclasses.asdict(model),
        "batch": batch_size,
        "seq": seq,
        "parameters": parameter_count(start),
        "check": checked,
        "peer_options": tried,
        "peer_best": best,
        "seconds": {rival: found._asdict() for rival, found in times.items()},
        "tokens_per_second": {rival: tokens / found.wall for rival, found in times.items()},
        "ratio": times["peer"].wall / times["ours"].wall,
        "ratio_cpu_seconds": times["peer"].cpu / times["ours"].cpu,
    }


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    mine, theirs = (row["seconds"][rival] for rival in ("ours", "peer"))
    rates = row["tokens_per_second"]
    experts, attention, compiled = row["peer_best"]
    return (
        f"{row['shape']:8s} {row['parameters'] / 1e6:6.2f}M "
        f"ours {rates['ours']:7.0f} tokens/s ({mine['wall'] * 1e3:.0f} ms, CPU {mine['cpu'] * 1e3:.0f} ms)  "
        f"transformers {rates['peer']:7.0f} "
        f"({theirs['wall'] * 1e3:.0f} ms, CPU {theirs['cpu'] * 1e3:.0f} ms; "
        f"{experts}, {attention}{', compiled' if compiled else ''})  "
        f"ratio {row['ratio']:.2f}, by CPU seconds {row['ratio_cpu_seconds']:.2f}"
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one shape; all by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="try torch.compile too: minutes a shape")
    parser.add_argument("--peer", help="EXPERTS,ATTENTION: this option of the peer alone, no search")
    parser.add_argument("--system-allocator", action="store_true", help="leave the C library as it is")
    parser.add_argument("--out", help="where to write JSON")
    arguments = parser.parse_args(argv)
    kept = not arguments.system_allocator and keep_freed_memory()
    options = [option for option in OPTIONS if arguments.compile or not option[2]]
    if arguments.peer:
        experts, _, attention = arguments.peer.partition(",")
        options = [(experts, attention, arguments.compile)]
    rows = []
    for name in arguments.shape or SHAPES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about options that it tries.
            row = measure(name, arguments.rounds, options)
        print(line(row), flush=True)
        rows.append(row)
    print(f"geometric mean of the ratios {math.prod(r['ratio'] for r in rows) ** (1 / len(rows)):.2f}")
    if arguments.out:
        cpu.write(arguments.out, rows, threads=torch.get_num_threads(), freed_memory_kept=kept)
    return rows


if __name__ == "__main__":
    main()

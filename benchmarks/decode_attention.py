"""Decoding attention over the latent cache: bandwidth and arithmetic against what this GPU reaches, and XLA.

    PYTHONPATH=. python benchmarks/decode_attention.py [--out results.json] [--only 'H16'] [--rounds 2]
        [--after FILE]

Before a shape is timed, ours is compared with float64 on the same operands, and must repeat bit for bit. The
peer is XLA: `dense`, three products and a softmax over the whole capacity, or, for a paged or quantised
cache, `blocked`. Beside a quantised cache ours runs on one in bf16 as well.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import timing  # Before JAX allocates.

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels import mla_decode
from pallas_kernels.mla_decode.shapes import BENCHMARK, Shape


def dense(q, c_kv, k_rope, lengths, *, scale):
    """The same over a contiguous cache, by XLA's own products."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    rank, s_q = c_kv.shape[-1], q.shape[1]
    logits = dot("bshr,btr->bsht", q[..., :rank], c_kv) + dot("bshp,btp->bsht", q[..., rank:], k_rope)
    seen = lengths[:, None] - s_q + jnp.arange(s_q) + 1
    visible = (jnp.arange(c_kv.shape[1]) < seen[..., None])[:, :, None]
    p = jax.nn.softmax(jnp.where(visible, logits * scale, -jnp.inf), axis=-1)
    return dot("bsht,btr->bshr", p.astype(q.dtype), c_kv).astype(q.dtype)


def float64(q, c_kv, k_rope, lengths, *, scale, page_table=None, c_kv_scale=None, k_rope_scale=None):
    """Output in float64 by torch, one sequence at a time."""

    def cache(codes, factors):
        codes = torch.from_dlpack(codes.astype(jnp.float32)).double()
        return codes if factors is None else codes * torch.from_dlpack(factors).double()[..., None]

    q, c_kv, k_rope = torch.from_dlpack(q), cache(c_kv, c_kv_scale), cache(k_rope, k_rope_scale)
    outs = []
    for row, length in enumerate(np.asarray(lengths).tolist()):
        pages = row if page_table is None else np.asarray(page_table[row]).tolist()
        values = c_kv[pages].reshape(-1, c_kv.shape[-1])[:length]
        keys = torch.cat([values, k_rope[pages].reshape(-1, k_rope.shape[-1])[:length]], -1)
        s_q = q.shape[1]
        logits = torch.einsum("shd,td->sht", q[row].double(), keys) * scale
        hidden = torch.arange(length)[None] > (length - s_q + torch.arange(s_q))[:, None]
        logits = logits.masked_fill(hidden[:, None].to(logits.device), -torch.inf)
        outs.append(torch.einsum("sht,tr->shr", logits.softmax(-1), values))
    return torch.stack(outs)


def error(got, want):
    difference = torch.from_dlpack(got).double() - want
    return (torch.linalg.norm(difference) / torch.linalg.norm(want)).item()


def check(shape: Shape) -> dict:
    """The larger error of both ways over at most two sequences of the shape, and whether they repeat."""
    shape = _checked(shape)
    operands, options = shape.operands()
    want = float64(*operands, **options)
    options.pop("scale")
    errors, repeats = [], True
    for name in OURS:
        runs = [_op(shape, name)(operands, options) for _ in range(3)]
        same = [jnp.array_equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)]
        errors.append(error(runs[0][0], want))
        repeats &= all(map(bool, same))
    return {"case": f"{shape} checked", "error": max(errors), "repeats": repeats}


def _checked(shape):
    lengths = shape.lengths if isinstance(shape.lengths, int) else shape.lengths[:2]
    return dataclasses.replace(shape, batch=min(shape.batch, 2), lengths=lengths)


def _inputs(shape):
    operands, options = shape.operands()
    return operands, {name: x for name, x in options.items() if name != "scale"}


@functools.cache
def _op(shape: Shape, name: str):
    """An executable of `_inputs` of a shape."""
    f = functools.partial(dense if name == "dense" else mla_decode, scale=SCALE)
    options = OURS.get(name) or ({} if name == "dense" else {"implementation": name})
    g = jax.jit(lambda operands, more: f(*operands, **more, **options))
    return g.lower(*jax.eval_shape(lambda: _inputs(shape))).compile()


SCALE = 192**-0.5
OURS = {
    "ours": {"implementation": "mosaic_gpu"},
    "ours, alike": {"implementation": "mosaic_gpu", "alike": True},
}


def rivals_of(shape: Shape) -> dict[str, tuple[Shape, str]]:
    """Of each rival the shape that it runs, and the implementation."""
    found = {name: (shape, name) for name in OURS}
    if shape.quantised:
        found["bf16 cache"] = dataclasses.replace(shape, cache="bfloat16"), "ours"
    name = "blocked" if shape.page or shape.quantised else "dense"
    return found | {name: (shape, name)}


def run(shape: Shape, rounds: int, read_tbps: float) -> dict:
    rivals = []
    for name, of_rival in rivals_of(shape).items():
        rivals.append(timing.Rival(name, functools.partial(_op(*of_rival), *_inputs(of_rival[0]))))
    times = timing.compare(rivals, rounds=rounds)
    parts = timing.cold_kernels(rivals[0].call)
    row = timing.row(str(shape), shape.flops(), shape.bytes(), times)
    row["kernels_us"] = [[name, seconds * 1e6] for name, seconds in parts]
    cells = []
    for name, r in row["rivals"].items():
        if name != "ours":
            cells.append(f"{name} {r['spaced_us']:.1f}/{r['hot_us']:.1f} us")
            continue
        hot_tbps = shape.bytes() / r["hot_us"] / 1e6
        cells.append(
            f"{name} {r['spaced_us']:.1f}/{r['hot_us']:.1f} us {r['spaced_tbps']:.2f}/{hot_tbps:.2f} TB/s "
            f"({r['spaced_tbps'] / read_tbps:.0%}) {r['spaced_tflops']:.0f} TFLOP/s"
        )
    print(f"{row['case']:<24} " + " | ".join(cells), flush=True)
    print("    " + " ".join(f"{name[:28]} {seconds:.1f}" for name, seconds in row["kernels_us"]), flush=True)
    return row


def read_bandwidth(size: int = 4 << 30) -> float:
    """TB/s of a sum over `size` bytes by XLA."""
    source = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    times = timing.compare([timing.Rival("read", lambda: total(source))], rounds=2, calls=3)
    return size / times["read"].spaced / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/decode_attention.json")
    parser.add_argument("--only", default="", help="run the shapes whose name matches this pattern")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--after", default="", help="compile, then wait for this file")
    args = parser.parse_args()
    shapes = [shape for shape in BENCHMARK if re.search(args.only, str(shape))]
    needed = [(_checked(shape), name) for shape in shapes for name in OURS]
    needed += itertools.chain(*(rivals_of(shape).values() for shape in shapes))
    # All compiled before any is timed, four at a time.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda of_rival: _op(*of_rival), dict.fromkeys(needed)))
    print("compiled", flush=True)
    while args.after and not pathlib.Path(args.after).exists():
        time.sleep(0.1)
    ceiling = timing.roofline()
    read_tbps = read_bandwidth()
    print(ceiling, f"read {read_tbps:.2f} TB/s", flush=True)
    rows, good = [{"case": "read by XLA", "tbps": read_tbps}], True
    for shape in shapes:
        result = check(shape)
        # bf16 rounds the weights and the output: 2^-9 each, at most.
        fine = result["repeats"] and result["error"] < 4e-3
        good &= fine
        print(f"{result['case']:<24} error {result['error']:.1e}" + ("" if fine else " WRONG"), flush=True)
        rows += [result, run(shape, args.rounds, read_tbps)]
        timing.write(args.out, rows, ceiling)
    if not good:
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()

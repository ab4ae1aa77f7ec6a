"""Grouped matrix products in bf16 against torch's `_grouped_mm`, forward, dgrad and wgrad.

    PYTHONPATH=. python benchmarks/grouped_gemm.py [--out results.json] [--only zipf] [--rounds 3]

Every result is first compared with a float64 product of the same operands, group by group, and two
runs must agree bit for bit.
"""

import argparse
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import timing  # Before JAX allocates.

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.shapes import BENCHMARK, Shape

PASSES = ("forward", "dgrad", "wgrad")
# Rounding to bf16 leaves a relative error of 2^-9 / sqrt(3) in the norm, float32 sums a thousandth of it.
TOLERANCE = 2e-3


@jax.jit
def _forward(x, w, sizes):
    return grouped_matmul(x, w, sizes)


@jax.jit
def _dgrad(dout, w, sizes):
    return grouped_matmul(dout, w, sizes, transpose_rhs=True)


@jax.jit
def _wgrad(x, dout, sizes):
    return mosaic_gpu.wgrad(x, dout, sizes, out_dtype=x.dtype)


def operands(shape: Shape):
    """Random x, w, dout and the sizes; x and dout have unit variance, w has 1/k."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (shape.rows, shape.k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (shape.groups, shape.k, shape.n), jnp.bfloat16) * shape.k**-0.5
    dout = jax.random.normal(keys[2], (shape.rows, shape.n), jnp.bfloat16)
    return x, w, dout, jnp.asarray(shape.sizes())


def peers(shape: Shape, x, w, dout, sizes):
    """For each pass (ours, torch's, its check against float64)."""
    tx, tw, tdout = (torch.from_dlpack(a) for a in (x, w, dout))
    offsets = torch.from_numpy(np.cumsum(np.asarray(sizes)).astype(np.int32)).cuda()
    product = torch._grouped_mm
    theirs = {
        "forward": lambda: product(tx, tw, offs=offsets),
        "dgrad": lambda: product(tdout, tw.transpose(1, 2), offs=offsets),
        "wgrad": lambda: product(tx.t(), tdout, offs=offsets),
    }
    ours = {
        "forward": functools.partial(_forward, x, w, sizes),
        "dgrad": functools.partial(_dgrad, dout, w, sizes),
        "wgrad": functools.partial(_wgrad, x, dout, sizes),
    }

    def check(name, result) -> float:
        result, ends, worst = torch.from_dlpack(result), np.cumsum(np.asarray(sizes)), 0.0
        for g, end in enumerate(ends):
            rows = slice(int(end - np.asarray(sizes)[g]), int(end))
            if name == "wgrad":
                got, want = result[g], tx[rows].double().t() @ tdout[rows].double()
            elif name == "dgrad":
                got, want = result[rows], tdout[rows].double() @ tw[g].double().t()
            else:
                got, want = result[rows], tx[rows].double() @ tw[g].double()
            error = torch.linalg.norm(got.double() - want) / max(torch.linalg.norm(want).item(), 1e-30)
            worst = max(worst, error.item() if not torch.isnan(error) else np.inf)
        if name != "wgrad" and ends[-1] < shape.rows:
            worst = max(worst, result[int(ends[-1]) :].abs().max().item())  # Zero is the contract.
        return worst

    return ours, theirs, check


def run(shape: Shape, passes, rounds: int):
    """Checks and times one shape; yields a row of results for each pass."""
    x, w, dout, sizes = operands(shape)
    ours, theirs, check = peers(shape, x, w, dout, sizes)
    rows = int(np.sum(np.asarray(sizes)))
    flops = 2.0 * rows * shape.k * shape.n
    moved = 2.0 * (rows * (shape.k + shape.n) + shape.groups * shape.k * shape.n)
    for name in passes:
        result = ours[name]()
        error = check(name, result)
        repeats = bool(jnp.array_equal(result, ours[name](), equal_nan=True))
        times = timing.compare(
            [timing.Rival("ours", ours[name]), timing.Rival("torch", theirs[name])], rounds=rounds
        )
        row = timing.row(f"{shape} {name}", flops, moved, times)
        row |= {"relative_error": error, "repeats_bitwise": repeats}
        verdict = "ok" if error < TOLERANCE and repeats else "WRONG"
        print(timing.line(row, "torch"), f" error {error:.1e} {verdict}", flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/gemm_grouped_bf16.json")
    parser.add_argument("--only", default="", help="run the shapes whose name contains this")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ceiling = timing.roofline()
    print(ceiling, flush=True)
    rows = []
    for shape in BENCHMARK:
        if args.only in str(shape):
            rows += run(shape, args.passes.split(","), args.rounds)
            timing.write(args.out, rows, ceiling)
    if any(row["relative_error"] >= TOLERANCE or not row["repeats_bitwise"] for row in rows):
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()

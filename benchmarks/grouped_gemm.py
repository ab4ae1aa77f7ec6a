"""Grouped matrix products, bf16 and FP8, against torch's bf16 `_grouped_mm`: forward, dgrad and wgrad.

    PYTHONPATH=. python benchmarks/grouped_gemm.py [--out results.json] [--only zipf] [--rounds 3]

Every result is first compared with a float64 product of the same operands (for FP8: of the quantised
operands), group by group, and two runs must agree bit for bit. FP8 weight gradients come out in
float32, bf16 ones in bf16. `--ragged-dot` times `jax.lax.ragged_dot` too, which takes a while, `--tune` other
tilings of the FP8 weight gradient and other bands of bf16, whose results must be the same.
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

from benchmarks.gemm import dequantized
from pallas_kernels import grouped_matmul
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad, mosaic_gpu_wgrad
from pallas_kernels.fp8_quantize import Quantized, quantize_blocks, quantize_columns, quantize_rows
from pallas_kernels.grouped_matmul import mosaic_gpu, reference
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


def xla(name: str, x, w, dout, sizes):
    """`jax.lax.ragged_dot` of one pass; None where XLA's program needs more memory than there is."""
    product = (
        reference.wgrad
        if name == "wgrad"
        else functools.partial(reference.forward, transpose_rhs=name == "dgrad")
    )
    left, right = {"forward": (x, w), "dgrad": (dout, w), "wgrad": (x, dout)}[name]
    call = functools.partial(jax.jit(functools.partial(product, out_dtype=x.dtype)), left, right, sizes)
    try:
        jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"lax.ragged_dot {name}: out of memory", flush=True)
        return None
    return call


def fp8(name: str, x, w, dout, sizes):
    """The FP8 call of one pass, and a function that gives its worst group's error."""
    if name == "wgrad":
        left, right = (jax.jit(quantize_columns)(a, sizes) for a in (x, dout))
        call = jax.jit(fp8_grouped_wgrad)
    else:
        left = jax.jit(quantize_rows)(x if name == "forward" else dout)
        right = jax.jit(quantize_blocks)(w.swapaxes(1, 2) if name == "forward" else w)
        call = jax.jit(fp8_grouped_matmul)
    counts = np.asarray(sizes)

    def error() -> float:
        result, worst, row = torch.from_dlpack(call(left, right, sizes)), 0.0, 0
        full = dequantized(left)
        for g, count in enumerate(counts):
            if name == "wgrad":
                count = -(-count // 128) * 128
                rows = slice(row, row + count)
                got, want = result[g], full[:, rows] @ dequantized(_part(right, rows)).t()
            else:
                rows = slice(row, row + count)
                weight = Quantized(right.values[g], right.scales[g])
                got, want = result[rows], full[rows] @ dequantized(weight).t()
            row += count
            difference = torch.linalg.norm(got.double() - want) / max(torch.linalg.norm(want).item(), 1e-30)
            worst = max(worst, difference.item() if not torch.isnan(difference) else np.inf)
        return worst

    return functools.partial(call, left, right, sizes), error


def _part(x: Quantized, rows: slice) -> Quantized:
    """Some blocks of 128 of the contraction."""
    return Quantized(x.values[:, rows], x.scales[rows.start // 128 : rows.stop // 128])


def tilings(name: str, ours, ours8, x, w, dout, sizes) -> dict:
    """One pass in other tilings: the weight gradient in FP8, the others in bf16.

    Raises:
      SystemExit: a tiling gives other bits.
    """
    calls, want = {}, ours8 if name == "wgrad" else ours
    if name == "wgrad":
        for tiling in (mosaic_gpu_wgrad.OVERLAPPED, *mosaic_gpu_wgrad.WIDE):
            label = "fp8 overlap 2" if tiling.overlap > 1 else f"fp8 {tiling.n} columns"
            product = functools.partial(mosaic_gpu_wgrad.wgrad, out_dtype=jnp.float32, tiling=tiling)
            calls[label] = functools.partial(jax.jit(product), *ours8.args)
    else:
        options = {"transpose_rhs": name == "dgrad", "out_dtype": x.dtype}
        for band in (1, 4):
            product = functools.partial(mosaic_gpu.forward, tiling=mosaic_gpu.Tiling(band=band), **options)
            left = dout if name == "dgrad" else x
            calls[f"bands of {band}"] = functools.partial(jax.jit(product), left, w, sizes)
    for label, call in calls.items():
        if not jnp.array_equal(call(), want()):
            raise SystemExit(f"{label}: other bits than ours")
    return calls


def run(shape: Shape, passes, rounds: int, ragged_dot: bool, tune: bool = False):
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
        call8, error8 = fp8(name, x, w, dout, sizes)
        errors = {"bf16": error, "fp8": error8()}
        calls = {"ours": ours[name], "ours fp8": call8, "torch": theirs[name]}
        if ragged_dot and (call := xla(name, x, w, dout, sizes)):
            calls["lax.ragged_dot"] = call
        if tune:
            calls |= tilings(name, ours[name], call8, x, w, dout, sizes)
        times = timing.compare([timing.Rival(rival, call) for rival, call in calls.items()], rounds=rounds)
        row = timing.row(f"{shape} {name}", flops, moved, times)
        row |= {"relative_error": errors, "repeats_bitwise": repeats}
        verdict = "ok" if max(errors.values()) < TOLERANCE and repeats else "WRONG"
        text = " ".join(f"{e:.1e}" for e in errors.values())
        print(timing.line(row, "torch"), f" errors {text} {verdict}", flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/gemm_grouped.json")
    parser.add_argument("--only", default="", help="run the shapes whose name contains this")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ragged-dot", action="store_true")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    ceiling = timing.roofline()
    print(ceiling, flush=True)
    rows = []
    for shape in BENCHMARK:
        if args.only in str(shape):
            rows += run(shape, args.passes.split(","), args.rounds, args.ragged_dot, args.tune)
            timing.write(args.out, rows, ceiling)
    if any(max(row["relative_error"].values()) >= TOLERANCE or not row["repeats_bitwise"] for row in rows):
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()

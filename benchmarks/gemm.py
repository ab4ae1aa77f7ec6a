"""FP8 matrix products against torch's blockwise `_scaled_mm`, with torch's bf16 product beside them.

    PYTHONPATH=. python benchmarks/gemm.py [--out results.json] [--only 8192x8192x8192] [--rounds 3] [--tune]

Every result is first compared with a float64 product of the dequantised operands, and two runs must
agree bit for bit. `--tune` times our other tilings as well.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import timing  # Before JAX allocates.

# isort: split
import jax
import jax.numpy as jnp
import torch

from pallas_kernels.fp8_grouped_matmul import mosaic_gpu_wgrad
from pallas_kernels.fp8_grouped_matmul.mosaic_gpu import Tiling
from pallas_kernels.fp8_matmul import fp8_matmul, mosaic_gpu
from pallas_kernels.fp8_matmul.shapes import BENCHMARK, Shape
from pallas_kernels.fp8_quantize import Quantized, quantize_blocks, quantize_rows

# Rounding to bf16 leaves a relative error of 2^-9 / sqrt(3) in the norm, the tensor cores a tenth of it.
TOLERANCE = 2e-3

_WAVE = Tiling(waves=1, stages=5, buffers=2)
TILINGS = {
    "two waves": Tiling(),
    "two waves, paired": Tiling(pair=True),
    "one wave": _WAVE,
    **{f"one wave, overlap {n}": dataclasses.replace(_WAVE, overlap=n) for n in (2, 3, 4)},
    "one wave, overlap 4, paired": dataclasses.replace(_WAVE, overlap=4, pair=True),
}
WGRAD_TILINGS = {f"{tiling.n} columns": tiling for tiling in mosaic_gpu_wgrad.WIDE}


def to_torch(x: jax.Array) -> torch.Tensor:
    """The same memory as a torch tensor."""
    if x.dtype == jnp.float8_e4m3fn:
        return torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(torch.float8_e4m3fn)
    return torch.from_dlpack(x)


def dequantized(x: Quantized) -> torch.Tensor:
    """Values times scales in float64."""
    values, scales = to_torch(x.values).double(), to_torch(x.scales).double()
    n, k = values.shape[-2:]
    if scales.shape == (-(-k // 128), n):
        return values * scales.t().repeat_interleave(128, 1)[:, :k]
    wide = scales.repeat_interleave(128, -1).repeat_interleave(128, -2)
    return values * wide[..., :n, :k]


def operands(shape: Shape) -> tuple[jax.Array, jax.Array, Quantized, Quantized]:
    """Random operands of unit variance in bf16, and quantised."""
    keys = jax.random.split(jax.random.key(0), 2)
    a = jax.random.normal(keys[0], (shape.m, shape.k), jnp.bfloat16)
    b = jax.random.normal(keys[1], (shape.n, shape.k), jnp.bfloat16)
    rows, blocks = jax.jit(quantize_rows), jax.jit(quantize_blocks)
    return a, b, rows(a), (rows if shape.wgrad else blocks)(b)


def rivals(shape: Shape, tune: bool) -> tuple[dict, torch.Tensor]:
    """Each rival's call, and the float64 product."""
    a, b, qa, qb = operands(shape)
    ta, tb = to_torch(a), to_torch(b)
    fa, fb = to_torch(qa.values), to_torch(qb.values)
    sa, sb = to_torch(qa.scales).t(), to_torch(qb.scales)
    if not shape.wgrad:
        sb = sb.t()
    ours = jax.jit(functools.partial(fp8_matmul, out_dtype=jnp.bfloat16))
    calls = {
        "ours": lambda: ours(qa, qb),
        "torch": lambda: torch._scaled_mm(fa, fb.t(), sa, sb, out_dtype=torch.bfloat16),
        "torch bf16": lambda: ta @ tb.t(),
    }
    if shape.wgrad:
        ours32 = jax.jit(functools.partial(fp8_matmul, out_dtype=jnp.float32))
        calls["ours fp32"] = lambda: ours32(qa, qb)
    tilings = TILINGS | (WGRAD_TILINGS if shape.wgrad else {})
    for name, tiling in tilings.items() if tune else ():
        tiled = jax.jit(functools.partial(mosaic_gpu.matmul, out_dtype=jnp.bfloat16, tiling=tiling))
        calls[name] = functools.partial(tiled, qa, qb)
    return calls, dequantized(qa) @ dequantized(qb).t()


def relative_error(got, want: torch.Tensor) -> float:
    got = got if isinstance(got, torch.Tensor) else to_torch(got)
    error = torch.linalg.norm(got.double() - want) / torch.linalg.norm(want)
    return float("inf") if torch.isnan(error) else error.item()


def run(shape: Shape, rounds: int, tune: bool = False):
    """Checks and times one shape."""
    calls, want = rivals(shape, tune)
    result = calls["ours"]()
    errors = {name: relative_error(call(), want) for name, call in calls.items()}
    repeats = bool(jnp.array_equal(result, calls["ours"](), equal_nan=True))
    del want
    times = timing.compare([timing.Rival(name, call) for name, call in calls.items()], rounds=rounds)
    row = timing.row(
        str(shape),
        2.0 * shape.m * shape.n * shape.k,
        (shape.m + shape.n) * shape.k + 2.0 * shape.m * shape.n,
        times,
    )
    row |= {"relative_error": errors, "repeats_bitwise": repeats}
    worst = max(error for name, error in errors.items() if name != "torch bf16")  # It is not quantised.
    row |= {"worst_error": worst}
    verdict = "ok" if worst < TOLERANCE and repeats else "WRONG"
    text = " ".join(f"{e:.1e}" for e in errors.values())
    print(timing.line(row, "torch"), f" errors {text} {verdict}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/gemm_fp8.json")
    parser.add_argument("--only", default="", help="run the shapes whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    ceiling = timing.roofline()
    print(ceiling, flush=True)
    rows = []
    for shape in BENCHMARK:
        if args.only in str(shape):
            rows.append(run(shape, args.rounds, args.tune))
            timing.write(args.out, rows, ceiling)
    if any(row["worst_error"] >= TOLERANCE or not row["repeats_bitwise"] for row in rows):
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()

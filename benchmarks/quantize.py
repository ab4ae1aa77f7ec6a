"""FP8 quantisation against the card's own copy bandwidth, XLA's version of the same, and torch's.

    PYTHONPATH=. python benchmarks/quantize.py [--out results.json] [--rounds 3]

torch's is compiled by `torch.compile` (`quantize_torch.py`). Bytes are those that must move: the operand
once, the values and the scales once. Packing to twelve bits, and unpacking, has to give XLA's very bits.
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

from benchmarks.quantize_torch import PEERS
from pallas_kernels.fp8_quantize import (
    Quantized,
    dequantize,
    pack_e5m6,
    pack_rows_e5m6,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    unpack_e5m6,
    unpack_rows_e5m6,
)

SHAPES = ((32768, 7168), (32768, 2048))


def cases(rows: int, k: int):
    """(name, operands, call taking them and `implementation=`) of each operation."""
    x = jax.random.normal(jax.random.key(0), (rows, k), jnp.bfloat16)
    quantised = jax.jit(functools.partial(quantize_rows, implementation="reference"))(x)
    sizes = jnp.full((64,), rows // 64 - 5, jnp.int32)
    yield "rows", (x,), quantize_rows
    yield "rows, power of two", (x,), functools.partial(quantize_rows, power_of_two=True)
    yield "rows of swiglu", (x,), functools.partial(quantize_rows, swiglu=True)
    yield "columns", (x,), quantize_columns
    yield "columns, 64 groups", (x, sizes), quantize_columns
    yield "columns of quantised rows", (quantised,), quantize_columns
    weights = x.astype(jnp.float32)
    yield "weight blocks", (weights,), quantize_blocks
    yield "weight blocks, transposed", (weights,), functools.partial(quantize_blocks, transpose=True)
    yield "e5m6 pack", (x,), pack_e5m6
    yield "e5m6 pack rows", (x,), pack_rows_e5m6
    packed, packed_rows = (
        jax.jit(functools.partial(pack, implementation="reference"))(x)
        for pack in (pack_e5m6, pack_rows_e5m6)
    )
    yield "e5m6 unpack", (packed,), unpack_e5m6
    yield "e5m6 unpack rows", (packed_rows,), unpack_rows_e5m6


def agreement(got: Quantized, want: Quantized) -> float:
    """Largest difference of the dequantised results over the largest magnitude; NaN never passes."""
    got, want = dequantize(got), dequantize(want)
    return float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))


def equal_bits(got, want) -> float:
    """The share of equal words in all arrays together."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    differing = sum(int(jnp.sum(a.view(words[a.itemsize]) != b.view(words[b.itemsize]))) for a, b in pairs)
    return 1 - differing / sum(a.size for a, _ in pairs)


def to_torch(x):
    """JAX's array as torch's, of FP8 too."""
    if x.dtype == jnp.float8_e4m3fn:
        return torch.from_dlpack(x.view(jnp.uint8)).view(torch.float8_e4m3fn)
    return torch.from_dlpack(x)


def to_jax(values, scales) -> Quantized:
    codes = jnp.from_dlpack(values.view(torch.uint8))
    return Quantized(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), jnp.from_dlpack(scales))


def compiled(peer, arguments):
    """torch's compiled call and its name; as it is written where torch has no compiler that works."""
    try:
        call = torch.compile(peer, dynamic=False)
        call(*arguments)
        return "torch", functools.partial(call, *arguments)
    except Exception as error:
        print(f"torch.compile: {str(error)[:300]}", flush=True)
        return "torch, not compiled", functools.partial(peer, *arguments)


def run(case: str, operands, function, rounds: int, peer=None):
    """Checks and times one case, beside torch's `peer` if there is one."""
    ours = jax.jit(functools.partial(function, implementation="mosaic_gpu"))
    xla = jax.jit(functools.partial(function, implementation="reference"))
    got, want = ours(*operands), xla(*operands)
    if isinstance(got, Quantized):
        same = float(np.mean(np.asarray(got.values.view(jnp.uint8) == want.values.view(jnp.uint8))))
        error = agreement(got, want)
    else:
        same = equal_bits(got, want)
        error = 0.0 if same == 1 else float("nan")
    rivals = [timing.Rival("ours", lambda: ours(*operands)), timing.Rival("xla", lambda: xla(*operands))]
    if peer:
        name, call = compiled(peer, [to_torch(x) for x in jax.tree.leaves(operands)])
        error = float(np.maximum(error, agreement(to_jax(*call()), want)))  # `max` would lose a NaN.
        rivals.append(timing.Rival(name, call))
    times = timing.compare(rivals, rounds=rounds)
    moved = sum(x.nbytes for x in jax.tree.leaves((operands, got)))
    return timing.row(case, 0.0, moved, times) | {"equal_values": same, "largest_difference": error}


def show(row, copy_tbps: float) -> None:
    cells = "  ".join(
        f"{rival} {r['spaced_tbps']:.2f} TB/s ({r['spaced_tbps'] / copy_tbps:.0%} of a copy)"
        for rival, r in row["rivals"].items()
    )
    equal = f"equal {row['equal_values']:.4%}" if "equal_values" in row else ""
    print(f"{row['case']:<44} {cells}  {equal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/gemm_quantize.json")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ceiling = timing.roofline()
    print(ceiling, flush=True)
    found = []
    for rows, k in SHAPES:
        found += [
            run(f"{rows}x{k} {name}", operands, function, args.rounds, PEERS.get(name))
            for name, operands, function in cases(rows, k)
            if args.only in f"{rows}x{k} {name}"
        ]
    for row in found:
        show(row, ceiling.copy_tbps)
    timing.write(args.out, found, ceiling)
    if any(not row["largest_difference"] < 0.07 for row in found):  # One step of E4M3 at the top: 32 / 448.
        raise SystemExit("a result is wrong")


if __name__ == "__main__":
    main()

"""Times `gather_matvec` at the shapes of a decode step of `configs/small_gpu.py`, in TB/s of matrices read.

    python benchmarks/gather_matvec.py [--splits] [--out results.json]

Every call reads other matrices than the one before, more in all than the L2 cache holds. Results are
checked against float64 first. The rival is XLA's own product of the gathered matrices. `--splits` tries other
divisions of the work than the one that the kernel takes.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import timing  # noqa: I001  First: it turns off JAX's preallocation.

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gather_matvec import gather_matvec, mosaic_gpu
from pallas_kernels.gather_matvec.mosaic_gpu import Split

# rows, groups, k, n
SHAPES = {
    "queries and latents": (1, 24, 2048, 3648),
    "absorbed keys": (16, 192, 128, 512),
    "absorbed values": (16, 192, 512, 128),
    "attention output": (1, 24, 2048, 2048),
    "experts in": (8, 66, 2048, 2816),
    "experts out": (8, 66, 1408, 2048),
    "head": (1, 3, 2048, 32768),
}
CALLS = 24
TOLERANCE = 1e-5  # Products of bf16 numbers are exact in float32; their sums of 2048 terms are not.


def splits(rows: int, k: int, n: int) -> list[Split]:
    """Divisions worth a try."""
    found = []
    for width in (512, 256, 128):
        for warpgroups in (1, 4):
            for flight in (16, 32):
                steps = k // flight
                counts = [p for p in range(1, steps // warpgroups + 1) if steps % (p * warpgroups) == 0]
                programs = rows * -(-n // width) * warpgroups
                if n >= width and counts:
                    parts = min(counts, key=lambda p: abs(np.log(p * programs / 1056)))
                    found.append(Split(width, parts, warpgroups, flight))
    return found


def programs(shape: tuple[int, int, int, int], operands: Any, every: bool) -> dict[str, Any]:
    """Compiled calls of (lhs, rhs, indices), by name."""
    rows, _, k, n = shape
    rivals: dict[str, Any] = {
        "chosen": functools.partial(gather_matvec, implementation="mosaic_gpu"),
        "xla": functools.partial(gather_matvec, implementation="reference"),
    }
    for how in splits(rows, k, n) if every else ():
        rivals[str(tuple(how))] = lambda a, b, c, how=how: mosaic_gpu.partial_sums(
            a.astype(jnp.float32), b, c, how
        )

    def compiled(f: Any) -> Any:
        return jax.jit(f).lower(*operands).compile()

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        jobs = {name: pool.submit(compiled, f) for name, f in rivals.items()}
    for name, job in jobs.items():
        if job.exception() is not None:
            print(shape, name, str(job.exception())[:200])
    return {name: job.result() for name, job in jobs.items() if job.exception() is None}


def seconds(call: Any, lhs: Any, rhs: Any, indices: list[Any]) -> float:
    """Median time of a call's kernels."""

    def work() -> None:
        for index in indices:
            jax.block_until_ready(call(lhs, rhs, index))

    work()
    kernels = [time for _, time in timing.kernels(work)]
    each = len(kernels) // len(indices)
    return statistics.median(sum(kernels[i * each : (i + 1) * each]) for i in range(len(indices)))


def measure(name: str, shape: tuple[int, int, int, int], every: bool) -> list[dict[str, Any]]:
    """Checks and times all rivals at one shape."""
    rows, groups, k, n = shape
    lhs = jax.random.normal(jax.random.key(0), (rows, k), jnp.bfloat16)
    rhs = jax.random.normal(jax.random.key(1), (groups, k, n), jnp.bfloat16)
    rng = np.random.default_rng(0)
    indices = [jnp.asarray(rng.choice(groups, rows, replace=False), jnp.int32) for _ in range(CALLS)]
    wide = (np.asarray(x, np.float64) for x in (lhs, rhs[indices[0]]))
    expected, size, out = np.einsum("rk,rkn->rn", *wide), 2 * rows * k * n, []
    print(f"{name} {shape} {mosaic_gpu.split(rows, k, n)}, {size / 1e6:.1f} MB")
    for rival, call in programs(shape, (lhs, rhs, indices[0]), every).items():
        found = np.asarray(call(lhs, rhs, indices[0]), np.float64)
        found = found.sum(1) if found.ndim == 3 else found
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        if not error < TOLERANCE:
            raise RuntimeError(f"{name}, {rival}: relative error {error}")
        time = seconds(call, lhs, rhs, indices)
        out.append(
            {"case": name, "rival": rival, "us": time * 1e6, "tbps": size / time / 1e12, "error": error}
        )
    for row in sorted(out, key=lambda row: row["us"]):
        print(f"  {row['us']:7.1f} us {row['tbps']:5.2f} TB/s  {row['rival']}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = [row for name, shape in SHAPES.items() for row in measure(name, shape, arguments.splits)]
    if arguments.out:
        pathlib.Path(arguments.out).write_text(
            json.dumps({"versions": timing.versions(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

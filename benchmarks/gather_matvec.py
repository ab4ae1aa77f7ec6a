"""Times `gather_matvec` at the shapes of a decode step of `configs/small_gpu.py`, in TB/s of matrices read.

    python benchmarks/gather_matvec.py [--splits] [--out results.json]

Every call reads other matrices than the one before, more in all than the L2 cache holds. Results are checked
against float64 first. The rival is XLA's own product of the gathered matrices. `--splits` tries other divisions of
the work than the one that the kernel takes.
"""

import argparse
import concurrent.futures
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


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows_out: list[dict[str, Any]] = []
    for name, (rows, groups, k, n) in SHAPES.items():
        lhs = jax.random.normal(jax.random.key(0), (rows, k), jnp.bfloat16)
        rhs = jax.random.normal(jax.random.key(1), (groups, k, n), jnp.bfloat16)
        rng = np.random.default_rng(0)
        indices = [jnp.asarray(rng.choice(groups, rows, replace=False), jnp.int32) for _ in range(CALLS)]
        rivals: dict[str, Any] = {
            "chosen": lambda a, b, c: gather_matvec(a, b, c, implementation="mosaic_gpu"),
            "xla": lambda a, b, c: gather_matvec(a, b, c, implementation="reference"),
        }
        if arguments.splits:
            for how in splits(rows, k, n):
                rivals[str(tuple(how))] = lambda a, b, c, how=how: mosaic_gpu.partial_sums(
                    a.astype(jnp.float32), b, c, how
                )
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            compiled = {
                rival: pool.submit(lambda f=f: jax.jit(f).lower(lhs, rhs, indices[0]).compile())
                for rival, f in rivals.items()
            }
        expected = np.einsum(
            "rk,rkn->rn", np.asarray(lhs, np.float64), np.asarray(rhs[indices[0]], np.float64)
        )
        times = {}
        for rival, job in compiled.items():
            if job.exception() is not None:
                print(name, rival, str(job.exception())[:200])
                continue
            call = job.result()
            found = np.asarray(call(lhs, rhs, indices[0]), np.float64)
            found = found.sum(1) if found.ndim == 3 else found
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            if not error < (TOLERANCE if rival != "xla" else 1e-2):
                raise RuntimeError(f"{name}, {rival}: relative error {error}")

            def work(call=call):
                for index in indices:
                    jax.block_until_ready(call(lhs, rhs, index))

            work()
            kernels = [seconds for _, seconds in timing.kernels(work)]
            each = len(kernels) // CALLS
            times[rival] = statistics.median(sum(kernels[i * each : (i + 1) * each]) for i in range(CALLS))
        size = 2 * rows * k * n
        print(f"{name} {(rows, groups, k, n)} {mosaic_gpu.split(rows, k, n)}, {size / 1e6:.1f} MB")
        for rival, seconds in sorted(times.items(), key=lambda item: item[1]):
            print(f"  {seconds * 1e6:7.1f} us {size / seconds / 1e12:5.2f} TB/s  {rival}")
            row = {"case": name, "rival": rival, "us": seconds * 1e6, "tbps": size / seconds / 1e12}
            rows_out.append(row)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(
            json.dumps({"versions": timing.versions(), "rows": rows_out}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

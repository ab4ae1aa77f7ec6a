"""`gather_matvec` for Hopper, in Pallas Mosaic GPU: bf16 matrices, float32 sums, bound by reading the former.

There is nothing for the tensor cores to reuse. A program takes some columns of a matrix and a part of its
rows, which its warpgroups divide; a thread adds up one or two columns in registers, with `FLIGHT` rows loaded
before the first is used, so that enough bytes are on their way. The warpgroups' sums are added in shared
memory, the programs' by XLA, in the kernel of whatever reads the result.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations

THREADS = 128  # Of a warpgroup.
WIDTHS = (256, 128)
FLIGHT = 16
WARPGROUPS = (4, 2, 1)
PROGRAMS = 264  # Wanted in all: two on each multiprocessor.


class Split(NamedTuple):
    """How the work of one row is divided."""

    width: int  # Columns of a program: 4 or 2 bytes a thread and row.
    parts: int  # Programs that share the columns, each with a part of k.
    warpgroups: int  # Of a program, likewise.
    flight: int  # Rows that a thread loads before it uses the first.


def unsupported(lhs, rhs, indices) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if jax.__version_info__ < (0, 11, 2):
        return f"JAX {jax.__version__} is older than 0.11.2: install dsv3-jax[gpu] on Python 3.12"
    if implementations.platform() != "gpu":
        return f"it runs on NVIDIA Hopper, not on {implementations.platform()}: take 'sliced'"
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        return f"compute capability {jax.devices()[0].compute_capability}, it needs 9.0: take 'reference'"
    if not lhs.dtype == rhs.dtype == jnp.bfloat16:
        return f"lhs {lhs.dtype} and rhs {rhs.dtype}: cast both to bfloat16"
    k, n = rhs.shape[1:]
    if not len(indices) or not k or k % FLIGHT or n % 2 or n < WIDTHS[-1]:
        return f"k {k} must be a multiple of {FLIGHT}, n {n} even and at least {WIDTHS[-1]}: take 'reference'"
    return None


def split(rows: int, k: int, n: int) -> Split:
    """The division of a call that comes closest to `PROGRAMS`."""
    steps = k // FLIGHT
    warpgroups = next(w for w in WARPGROUPS if steps % w == 0)
    width = next(w for w in WIDTHS if n >= w)
    programs = rows * math.ceil(n / width)
    counts = [p for p in range(1, steps // warpgroups + 1) if steps % (p * warpgroups) == 0]
    parts = min(counts, key=lambda p: abs(math.log(p * programs / PROGRAMS)))
    return Split(width, parts, warpgroups, FLIGHT)


def product(lhs, rhs, indices, each, alike):
    """`out[i] = lhs[i // each] @ rhs[indices[i]]` in float32, divided as a call of `alike` products is."""
    how = split(alike, *rhs.shape[1:])
    parts = partial_sums(lhs, rhs, indices.astype(jnp.int32), how, each)
    return functools.reduce(jnp.add, (parts[:, i] for i in range(how.parts)))


@functools.partial(jax.jit, static_argnames=("how", "each"))  # The layers of a model share what is lowered.
def partial_sums(lhs, rhs, indices, how: Split, each: int = 1):
    """float32 `[products, parts, n]`, whose sum over the parts is the product."""
    rows, (k, n) = len(indices), rhs.shape[1:]
    width, parts, warpgroups, flight = how
    layout = plgpu.Layout.WG_STRIDED((width,), width // THREADS)
    length = k // (parts * warpgroups)

    def kernel(lhs, rhs, indices, out, sums, done):
        row, chunk, part = (lax.axis_index(name) for name in ("row", "chunk", "part"))
        warpgroup = lax.axis_index("wg")
        group = indices[row]
        # The last columns move back to end at n: what two programs both compute is the same.
        columns = pl.ds(jnp.minimum(chunk * width, n - width), width)

        def step(i, total):
            first = (part * warpgroups + warpgroup) * length + i * flight
            found = [plgpu.load(rhs.at[group, first + j, columns], layout=layout) for j in range(flight)]
            factors = [lhs[lax.div(row, each), first + j].astype(jnp.float32) for j in range(flight)]
            for values, factor in zip(found, factors, strict=True):
                total = total + values.astype(jnp.float32) * factor
            return total

        zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        total = lax.fori_loop(0, length // flight, step, zeros)
        if warpgroups == 1:
            out[row, part, columns] = total
            return
        sums[warpgroup] = total
        plgpu.barrier_arrive(done)

        @pl.when(warpgroup == 0)
        def _():
            plgpu.barrier_wait(done)
            found = [plgpu.load(sums.at[i], layout=layout) for i in range(warpgroups)]
            out[row, part, columns] = functools.reduce(jnp.add, found)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, parts, n), jnp.float32),
        # Programs that read the same columns for several rows run together: the L2 cache serves all but one.
        grid=(rows, math.ceil(n / width), parts),
        grid_names=("row", "chunk", "part"),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=dict(
            sums=plgpu.SMEM((warpgroups, width), jnp.float32), done=plgpu.Barrier(num_arrivals=warpgroups)
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="gather_matvec",
    )(lhs, rhs, indices)

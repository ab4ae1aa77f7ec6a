"""FP8 weight gradients for Hopper: both operands scaled row by row, the rows of the batch contracted.

The operands come transposed, `[features, rows]`, since FP8 tensor cores want the contraction innermost,
and every group starts at a multiple of 128 rows, filled up with zeros: so a step never mixes groups and
one scale serves a feature for a whole step. The rest is built like the forward product.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_grouped_matmul import hopper
from pallas_kernels.fp8_grouped_matmul.mosaic_gpu import SCALED, STEP, Tiling, drain
from pallas_kernels.grouped_matmul import mosaic_gpu as bf16
from pallas_kernels.grouped_matmul import schedule
from pallas_kernels.grouped_matmul.hopper import ROW_BYTES, WARPGROUP_ROWS, swizzled
from pallas_kernels.grouped_matmul.mosaic_gpu import FETCH_REGISTERS, FETCHER, MULTIPLY_REGISTERS

GROUPED = Tiling(waves=1, stages=5, buffers=2)
# Of one product: two steps overlapped, or as many columns as the registers hold without that.
OVERLAPPED = dataclasses.replace(GROUPED, overlap=2)
WIDE = tuple(Tiling(waves=1, n=n, stages=4, buffers=2) for n in (160, 176, 192))
SCALES = 32  # Are copied at a time: 128 bytes.


def tiling_for(m: int, n: int) -> Tiling:
    """The tiling with the shorter rounds over all multiprocessors; the last round may be half empty."""

    def rounds(tiling):
        tiles = -(-m // tiling.rows) * -(-n // tiling.n)
        return -(-tiles // bf16.multiprocessors()) * tiling.n

    return min(OVERLAPPED, *WIDE, key=rounds)


def wgrad(
    lhs, rhs, group_sizes, *, out_dtype, promote: bool = True, tiling: Tiling | None = None, accumulate=None
):
    """`out[g] = lhs[:, rows of g] @ rhs[:, rows of g].T`; zero for an empty group.

    Args:
      lhs, rhs: `[m, rows]` and `[n, rows]` with scales `[rows / 128, m]` and `[rows / 128, n]`; each
        group starts at a multiple of 128 rows, and what follows its last row is zero.
      group_sizes: rows of each group, without the filling.
      promote: without it the scales are left out: the caller applies them.
      accumulate: float32 `[groups, m, n]` to add to, in place; see `mosaic_gpu.adds_into`.
    """
    blocks = -(-group_sizes // SCALED)
    table = schedule.groups_by_size(blocks)  # First step, and step after the last.
    return _product(table, lhs, rhs, accumulate, jnp.dtype(out_dtype), tiling or GROUPED, promote)


def dense(lhs, rhs, *, out_dtype, promote: bool = True, tiling: Tiling | None = None, accumulate=None):
    """`lhs @ rhs.T`, both operands scaled row by row."""
    depth = lhs.values.shape[1]
    pad = [(0, 0), (0, -depth % SCALED)]
    if depth % SCALED:
        lhs, rhs = (type(x)(jnp.pad(x.values, pad), x.scales) for x in (lhs, rhs))
    table = jnp.asarray(np.array([[0, 0, -(-depth // SCALED), 0]], np.int32))
    into = None if accumulate is None else accumulate[None]
    tiling = tiling or tiling_for(lhs.values.shape[0], rhs.values.shape[0])
    return _product(table, lhs, rhs, into, jnp.dtype(out_dtype), tiling, promote)[0]


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _product(table, lhs, rhs, into, out_dtype, tiling: Tiling, promote: bool):
    m, n = lhs.values.shape[0], rhs.values.shape[0]
    lhs, rhs = _padded(lhs), _padded(rhs)
    store_columns = math.gcd(tiling.n, ROW_BYTES // out_dtype.itemsize)
    operand, result = swizzled(lhs[0].dtype), swizzled(out_dtype, store_columns * out_dtype.itemsize)
    cluster = 2 if tiling.pair else 1
    free = (
        plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=2, num_barriers=tiling.stages)
        if tiling.pair
        else plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages)
    )
    whole = jax.ShapeDtypeStruct((table.shape[0], lhs[0].shape[0], rhs[0].shape[0]), out_dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, promote=promote, add=into is not None),
        out_type=whole if into is None else (),
        grid=(bf16.multiprocessors() // cluster,),
        grid_names=("sm",),
        cluster=(cluster,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            left_smem=plgpu.SMEM((tiling.stages, tiling.rows, STEP), lhs[0].dtype, transforms=operand),
            right_smem=plgpu.SMEM((tiling.stages, tiling.n, STEP), rhs[0].dtype, transforms=operand),
            left_scale_smem=plgpu.SMEM((tiling.stages, tiling.rows), jnp.float32),
            right_scale_smem=plgpu.SMEM((tiling.stages, tiling.n + -tiling.n % SCALES), jnp.float32),
            out_smem=plgpu.SMEM(
                (2, tiling.buffers, WARPGROUP_ROWS, store_columns), out_dtype, transforms=result
            ),
            full=plgpu.Barrier(num_arrivals=4, num_barriers=tiling.stages),
            free=free,
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="fp8_matmul_wgrad",
    )
    if into is not None:
        return hopper.added(kernel, into, table, *lhs, *rhs)
    out = kernel(table, *lhs, *rhs)
    return out if out.shape[1:] == (m, n) else out[:, :m, :n]


def _padded(operand):
    """The features padded to what the copy engine stores."""
    missing = -operand.values.shape[0] % 64
    if not missing:
        return operand.values, operand.scales
    return jnp.pad(operand.values, ((0, missing), (0, 0))), jnp.pad(operand.scales, ((0, 0), (0, missing)))


def _kernel(table, lhs, lhs_scales, rhs, rhs_scales, out, *, tiling, promote, add, **scratch):
    groups, out_rows, columns = out.shape
    width = tiling.n * (2 if tiling.pair else 1)
    grid = pl.cdiv(out_rows, tiling.rows), pl.cdiv(columns, width)
    warpgroup = lax.axis_index("wg")

    def each_tile(body):
        """Runs `body(step, group, first, row, column, steps)`; `step` counts stages, and is returned."""

        @plgpu.nd_loop((groups, grid[0] * grid[1]), collective_axes="sm", init_carry=jnp.int32(0))
        def last(info, carry):
            place, tile = info.index
            row_tile, column_tile = plgpu.planar_snake(tile, grid, 0, tiling.band)
            group, first, end = (table[place, i] for i in range(3))
            column = column_tile * width + lax.axis_index("pair") * tiling.n
            return body(carry, group, first, row_tile * tiling.rows, column, end - first)

        return last

    def fetcher():
        _fetch(each_tile, lhs, lhs_scales, rhs, rhs_scales, tiling=tiling, **scratch)

    def multiplier():
        _multiply(each_tile, out, warpgroup, tiling=tiling, promote=promote, add=add, **scratch)

    lax.cond(warpgroup == FETCHER, fetcher, multiplier)


def _fetch(
    each_tile, lhs, lhs_scales, rhs, rhs_scales, *,
    left_smem, right_smem, left_scale_smem, right_scale_smem, out_smem, full, free, tiling,
):  # fmt: skip
    del out_smem
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

    @each_tile
    def last(step, group, first, row, column, steps):
        del group

        def fetch(i, step):
            slot = lax.rem(step, jnp.int32(tiling.stages))
            plgpu.barrier_wait(free.at[slot])
            at, down, across = first + i, pl.ds(row, tiling.rows), pl.ds(column, tiling.n)
            scaled = pl.ds(column, right_scale_smem.shape[1])
            along = pl.ds(at * STEP, STEP)
            together = dict(collective_axes="pair") if tiling.pair else {}
            ready = full.at[slot]
            plgpu.copy_gmem_to_smem(lhs.at[down, along], left_smem.at[slot], ready, **together)
            plgpu.copy_gmem_to_smem(rhs.at[across, along], right_smem.at[slot], ready)
            plgpu.copy_gmem_to_smem(lhs_scales.at[at, down], left_scale_smem.at[slot], ready)
            plgpu.copy_gmem_to_smem(rhs_scales.at[at, scaled], right_scale_smem.at[slot], ready)
            return step + 1

        return lax.fori_loop(0, steps, fetch, step)

    drain(free, last, tiling)


def _multiply(
    each_tile, out, warpgroup, *,
    left_smem, right_smem, left_scale_smem, right_scale_smem, out_smem, full, free, tiling,
    promote, add,
):  # fmt: skip
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
    bf16.release_all(free, tiling.stages)
    own_rows = tiling.waves * WARPGROUP_ROWS
    contract = _unpromoted if not promote else _overlapping if tiling.overlap > 1 else _in_turn

    @each_tile
    def _(step, group, first, row, column, steps):
        del first
        refs = left_smem, right_smem, left_scale_smem, right_scale_smem, full, free
        step, sums = contract(step, steps, warpgroup * own_rows, refs, tiling)
        for wave, value in enumerate(sums):
            value = plgpu.layout_cast(value, plgpu.Layout.WGMMA)
            at = row + warpgroup * own_rows + wave * WARPGROUP_ROWS
            # Nothing is added for an empty group; without a sum to add to, its zeros are stored.
            wanted = steps > 0 if add else True
            hopper.store(value, out.at[group], out_smem.at[warpgroup], at, column, wanted=wanted, add=add)
        return step

    plgpu.wait_smem_to_gmem(0)


def _in_turn(step, steps, first_row, refs, tiling):
    """The sums of a warpgroup's waves, one product after the other; the other warpgroup fills the gaps."""
    left_smem, right_smem, left_scale_smem, right_scale_smem, full, free = refs
    own_columns = pl.ds(0, tiling.n)

    def one(_, carry):
        step, sums = carry
        slot = lax.rem(step, jnp.int32(tiling.stages))
        plgpu.barrier_wait(full.at[slot])
        sums = list(sums)
        for wave in range(tiling.waves):
            rows = pl.ds(first_row + wave * WARPGROUP_ROWS, WARPGROUP_ROWS)
            by_row = plgpu.load(left_scale_smem.at[slot, rows], layout=hopper.PER_ROW)
            value = hopper.settle(hopper.multiply(left_smem.at[slot, rows], right_smem.at[slot]), 0)
            # After the product: before it, they take the registers that two waves lack.
            by_column = plgpu.load(right_scale_smem.at[slot, own_columns], layout=hopper.PER_COLUMN)
            if wave == tiling.waves - 1:
                plgpu.barrier_arrive(free.at[slot])
            sums[wave] = hopper.promote(sums[wave], value, [by_row], by_column)
        return step + 1, tuple(sums)

    nothing = tuple(hopper.zeros(tiling.n) for _ in range(tiling.waves))
    return lax.fori_loop(0, steps, one, (step, nothing))


def _unpromoted(step, steps, first_row, refs, tiling):
    """The sums of a warpgroup's waves as the tensor cores keep them over the whole contraction, unscaled."""
    left_smem, right_smem, _, _, full, free = refs

    def one(_, carry):
        step, sums = carry
        slot = lax.rem(step, jnp.int32(tiling.stages))
        plgpu.barrier_wait(full.at[slot])
        sums = list(sums)
        for wave in range(tiling.waves):
            rows = pl.ds(first_row + wave * WARPGROUP_ROWS, WARPGROUP_ROWS)
            started = hopper.multiply(left_smem.at[slot, rows], right_smem.at[slot], sums[wave])
            sums[wave] = hopper.settle(started, 0)
        plgpu.barrier_arrive(free.at[slot])
        return step + 1, tuple(sums)

    return lax.fori_loop(0, steps, one, (step, tuple(hopper.zeros(tiling.n) for _ in range(tiling.waves))))


def _overlapping(step, steps, first_row, refs, tiling):
    """The sums of a warpgroup's one wave, a product under way while the one before it is added."""
    left_smem, right_smem, left_scale_smem, right_scale_smem, full, free = refs
    own, own_columns = pl.ds(first_row, WARPGROUP_ROWS), pl.ds(0, tiling.n)

    def start(i):
        slot = lax.rem(step + i, jnp.int32(tiling.stages))
        plgpu.barrier_wait(full.at[slot])
        return hopper.multiply(left_smem.at[slot, own], right_smem.at[slot]), ()

    def finish(i, started, sums):
        slot = lax.rem(step + i, jnp.int32(tiling.stages))
        by_row = plgpu.load(left_scale_smem.at[slot, own], layout=hopper.PER_ROW)
        by_column = plgpu.load(right_scale_smem.at[slot, own_columns], layout=hopper.PER_COLUMN)
        sums = hopper.promote(sums, started[0], [by_row], by_column)
        plgpu.barrier_arrive(free.at[slot])
        return sums

    return step + steps, (hopper.accumulate(steps, start, finish, hopper.zeros(tiling.n), tiling.overlap),)

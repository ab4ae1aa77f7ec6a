"""FP8 products for Hopper, in Pallas Mosaic GPU: row-scaled by block-scaled operands, dense or in groups.

One persistent kernel, built like the bf16 `grouped_matmul`: a warpgroup fetches tiles into a ring of
shared-memory stages, two multiply. What differs is the arithmetic: every 128 of the contraction is a
product of its own, which is scaled and added in float32 (`hopper.py`). The row scales travel
with the rows; a block scale is a scalar, read one step ahead.

Optionally two neighbouring multiprocessors work on neighbouring columns of the same rows, and each
fetches half of the rows for both.

Needs a compute capability 9.0 GPU and JAX 0.11.2. Rows and k that are no multiples of 8 and 128 are
padded, which copies the operands.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_grouped_matmul import hopper
from pallas_kernels.grouped_matmul import mosaic_gpu as bf16
from pallas_kernels.grouped_matmul import schedule
from pallas_kernels.grouped_matmul.hopper import ROW_BYTES, WARPGROUP_ROWS, swizzled
from pallas_kernels.grouped_matmul.mosaic_gpu import FETCH_REGISTERS, FETCHER, MULTIPLY_REGISTERS

SCALED = 128  # Elements that share a scale.
STEP = hopper.STEP


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel cuts its work.

    Attributes:
      n: columns of a tile.
      waves: blocks of 64 rows that each of the two multiplying warpgroups takes, one after the other.
      pair: two multiprocessors share the rows of two tiles side by side: each fetches half for both.
      stages: operand tiles in flight.
      buffers: shared-memory buffers a warpgroup stores its result through.
      band: row tiles that are visited together, column by column, to reuse operands from the L2 cache.
      overlap: steps of the contraction that a warpgroup overlaps with itself, see `hopper.accumulate`;
        more than one takes the registers of a second wave.
    """

    n: int = 128
    waves: int = 2
    pair: bool = False
    stages: int = 4
    buffers: int = 1
    band: int = 4
    overlap: int = 1

    def __post_init__(self):
        if self.overlap > 1 and self.waves > 1:
            raise ValueError(
                f"Tiling: overlap={self.overlap} with waves={self.waves}; overlap takes one wave"
            )

    @property
    def rows(self) -> int:
        return 2 * self.waves * WARPGROUP_ROWS


def tiling_for(k: int) -> Tiling:
    """The faster of the measured tilings: short contractions gain from fetching in pairs, long ones lose."""
    return Tiling(pair=k <= 2048)


def unsupported(lhs, rhs) -> str | None:
    """Why this implementation cannot run the call, or None."""
    reason = bf16.unsupported(jax.ShapeDtypeStruct((1, 1), jnp.bfloat16), jnp.bfloat16(0), False)
    if reason is None and (lhs.scales.dtype != jnp.float32 or rhs.scales.dtype != jnp.float32):
        return f"scales in {lhs.scales.dtype} and {rhs.scales.dtype}: keep them in float32"
    return reason


def adds_into(accumulate, out_dtype) -> bool:
    """Whether the kernels add to `accumulate` `[..., m, n]` where it lies; else it is a sum of its own."""
    *_, m, n = accumulate.shape
    return accumulate.dtype == jnp.dtype(out_dtype) == jnp.float32 and m % 64 == 0 and n % 64 == 0


def forward(lhs, rhs, group_sizes, *, out_dtype, promote: bool = True, tiling: Tiling | None = None):
    """`out[r] = lhs[r] @ rhs[group of r].T`; rows past the sum of the sizes are zero.

    Without `promote` the scales are left out: the caller applies them.
    """
    tiling = tiling or tiling_for(lhs.values.shape[1])
    rows, columns = lhs.values.shape[0], rhs.values.shape[1]
    padded = rows + -rows % schedule.ALIGN
    tiles, count = schedule.row_tiles(group_sizes, padded, tiling.rows)
    operands = _padded(lhs, padded), _padded(rhs), None
    out = _product(tiles, count, *operands, jnp.dtype(out_dtype), tiling, promote)
    return out if out.shape == (rows, columns) else out[:rows, :columns]


def dense(lhs, rhs, *, out_dtype, promote: bool = True, tiling: Tiling | None = None, accumulate=None):
    """`lhs @ rhs.T`, added to `accumulate` if given: one group, whose tiles are known when compiling."""
    tiling = tiling or tiling_for(lhs.values.shape[1])
    rows, columns = lhs.values.shape[0], rhs.values.shape[0]
    padded = rows + -rows % schedule.ALIGN
    start = np.arange(0, padded, tiling.rows)
    tiles = np.stack([0 * start, start, start, np.minimum(start + tiling.rows, padded)], 1).astype(np.int32)
    rhs = _padded(type(rhs)(rhs.values[None], rhs.scales[None]))
    count = jnp.asarray([start.size], jnp.int32)
    lhs, out_dtype = _padded(lhs, padded), jnp.dtype(out_dtype)
    out = _product(jnp.asarray(tiles), count, lhs, rhs, accumulate, out_dtype, tiling, promote)
    return out if out.shape == (rows, columns) else out[:rows, :columns]


def _padded(operand, rows: int | None = None):
    """The contraction padded to whole steps, and the rows to `rows`, or to what the copy engine stores."""
    values, scales = operand
    missing = -values.shape[-2] % 64 if rows is None else rows - values.shape[-2]
    depth = -values.shape[-1] % STEP
    if missing or depth:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 2) + [(0, missing), (0, depth)])
    if rows is not None and missing:
        scales = jnp.pad(scales, ((0, 0), (0, missing)))
    return values, scales


# Jitted: calls of the same shape within one program are traced, lowered and compiled once.
@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _product(tiles, count, lhs, rhs, into, out_dtype, tiling: Tiling, promote: bool):
    store_columns = ROW_BYTES // out_dtype.itemsize
    operand, result = swizzled(lhs[0].dtype), swizzled(out_dtype)
    cluster = 2 if tiling.pair else 1
    free = (
        plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=2, num_barriers=tiling.stages)
        if tiling.pair
        else plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages)
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling, promote=promote, add=into is not None),
        out_type=()
        if into is not None
        else jax.ShapeDtypeStruct((lhs[0].shape[0], rhs[0].shape[1]), out_dtype),
        grid=(bf16.multiprocessors() // cluster,),
        grid_names=("sm",),
        cluster=(cluster,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            left_smem=plgpu.SMEM((tiling.stages, tiling.rows, STEP), lhs[0].dtype, transforms=operand),
            right_smem=plgpu.SMEM((tiling.stages, tiling.n, STEP), rhs[0].dtype, transforms=operand),
            scale_smem=plgpu.SMEM((tiling.stages, tiling.rows), jnp.float32),
            out_smem=plgpu.SMEM(
                (2, tiling.buffers, WARPGROUP_ROWS, store_columns), out_dtype, transforms=result
            ),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=tiling.stages),
            free=free,
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="fp8_matmul",
    )
    if into is not None:
        return hopper.added(kernel, into, tiles, count, *lhs, *rhs)
    return kernel(tiles, count, *lhs, *rhs)


def _kernel(tiles, count, lhs, lhs_scales, rhs, rhs_scales, out, *, tiling, promote, add, **scratch):
    groups, depth = rhs.shape[0], lhs.shape[1]
    width = tiling.n * (2 if tiling.pair else 1)
    column_tiles = pl.cdiv(out.shape[1], width)
    row_tiles = count[0]
    warpgroup = lax.axis_index("wg")

    def each_tile(body):
        """Runs `body(step, tile, column, steps)`; returns `step`, the stages since the kernel began."""

        @plgpu.nd_loop((row_tiles * column_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
        def last(info, carry):
            row_tile, column = plgpu.planar_snake(info.index[0], (row_tiles, column_tiles), 0, tiling.band)
            tile = [tiles[row_tile, i] for i in range(4)]
            # The rows past the sum of the sizes are a group without weights: nothing to multiply.
            steps = jnp.where(tile[0] < groups, depth // STEP, 0)
            column = column * width + lax.axis_index("pair") * tiling.n
            return body(carry, tile, column, steps)

        return last

    def fetcher():
        _fetch(each_tile, lhs, lhs_scales, rhs, tiling=tiling, **scratch)

    def multiplier():
        options = dict(tiling=tiling, promote=promote, add=add)
        _multiply(each_tile, rhs_scales, out, warpgroup, **options, **scratch)

    lax.cond(warpgroup == FETCHER, fetcher, multiplier)


def _fetch(
    each_tile, lhs, lhs_scales, rhs, *, left_smem, right_smem, scale_smem, out_smem, full, free, tiling
):
    del out_smem
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

    @each_tile
    def last(step, tile, column, steps):
        group, start, _, _ = tile

        def fetch(i, step):
            slot = lax.rem(step, jnp.int32(tiling.stages))
            plgpu.barrier_wait(free.at[slot])
            at, down = pl.ds(i * STEP, STEP), pl.ds(start, tiling.rows)
            together = dict(collective_axes="pair") if tiling.pair else {}
            plgpu.copy_gmem_to_smem(lhs.at[down, at], left_smem.at[slot], full.at[slot], **together)
            plgpu.copy_gmem_to_smem(lhs_scales.at[i, down], scale_smem.at[slot], full.at[slot])
            right = rhs.at[group, pl.ds(column, tiling.n), at]
            plgpu.copy_gmem_to_smem(right, right_smem.at[slot], full.at[slot])
            return step + 1

        return lax.fori_loop(0, steps, fetch, step)

    drain(free, last, tiling)


def _multiply(
    each_tile, rhs_scales, out, warpgroup, *,
    left_smem, right_smem, scale_smem, out_smem, full, free, tiling, promote,
    add,
):  # fmt: skip
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
    bf16.release_all(free, tiling.stages)
    own_rows = tiling.waves * WARPGROUP_ROWS
    contract = _unpromoted if not promote else _overlapping if tiling.overlap > 1 else _in_turn

    @each_tile
    def _(step, tile, column, steps):
        group, start, low, high = tile
        first = start + warpgroup * own_rows
        # Without steps there is no group either; the scale that is read then is not used.
        owner, last = jnp.minimum(group, rhs_scales.shape[0] - 1), jnp.maximum(steps - 1, 0)

        def block_scales(i):
            # A tile that starts in the middle of a block takes a scale every 64 columns.
            share = SCALED if tiling.n % SCALED == 0 else SCALED // 2
            blocks = [(column + at) // SCALED for at in range(0, tiling.n, share)]
            blocks = [jnp.minimum(block, rhs_scales.shape[1] - 1) for block in blocks]
            return tuple(rhs_scales[owner, block, jnp.minimum(i, last)] for block in blocks)

        def product():
            refs = left_smem, right_smem, scale_smem, full, free
            sums = contract(step, steps, warpgroup * own_rows, block_scales, refs, tiling)
            for wave, value in enumerate(sums):
                value = plgpu.layout_cast(value, plgpu.Layout.WGMMA)
                at = first + wave * WARPGROUP_ROWS
                if add:  # One group, whose rows end where the result does.
                    hopper.store(value, out, out_smem.at[warpgroup], at, column, add=True)
                else:
                    bf16.store(value, out, out_smem.at[warpgroup], at, low, high, column)

        def nothing():  # The other warpgroup has the tensor cores to itself.
            def skip(i, step):
                slot = lax.rem(step, jnp.int32(tiling.stages))
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return step + 1

            lax.fori_loop(0, steps, skip, step)

        lax.cond((first < high) & (first + own_rows > low), product, nothing)
        return step + steps

    plgpu.wait_smem_to_gmem(0)


def _in_turn(step, steps, first_row, block_scales, refs, tiling):
    """The sums of a warpgroup's waves, one product after the other; the other warpgroup fills the gaps."""
    left_smem, right_smem, scale_smem, full, free = refs

    def one(i, carry):
        step, scales, sums = carry
        slot = lax.rem(step, jnp.int32(tiling.stages))
        following = block_scales(i + 1)
        plgpu.barrier_wait(full.at[slot])
        sums = list(sums)
        for wave in range(tiling.waves):
            rows = pl.ds(first_row + wave * WARPGROUP_ROWS, WARPGROUP_ROWS)
            by_row = plgpu.load(scale_smem.at[slot, rows], layout=hopper.PER_ROW)
            value = hopper.settle(hopper.multiply(left_smem.at[slot, rows], right_smem.at[slot]), 0)
            if wave == tiling.waves - 1:
                plgpu.barrier_arrive(free.at[slot])
            sums[wave] = hopper.promote(sums[wave], value, [by_row * scale for scale in scales])
        return step + 1, following, tuple(sums)

    nothing = tuple(hopper.zeros(tiling.n) for _ in range(tiling.waves))
    _, _, sums = lax.fori_loop(0, steps, one, (step, block_scales(0), nothing))
    return sums


def _unpromoted(step, steps, first_row, block_scales, refs, tiling):
    """The sums of a warpgroup's waves as the tensor cores keep them over the whole contraction, unscaled."""
    del block_scales
    left_smem, right_smem, _, full, free = refs

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

    return lax.fori_loop(0, steps, one, (step, tuple(hopper.zeros(tiling.n) for _ in range(tiling.waves))))[1]


def _overlapping(step, steps, first_row, block_scales, refs, tiling):
    """The sums of a warpgroup's one wave, a product under way while the one before it is added."""
    left_smem, right_smem, scale_smem, full, free = refs
    own = pl.ds(first_row, WARPGROUP_ROWS)

    def start(i):
        slot = lax.rem(step + i, jnp.int32(tiling.stages))
        scales = block_scales(i)
        plgpu.barrier_wait(full.at[slot])
        return hopper.multiply(left_smem.at[slot, own], right_smem.at[slot]), scales

    def finish(i, started, sums):
        value, scales = started
        slot = lax.rem(step + i, jnp.int32(tiling.stages))
        by_row = plgpu.load(scale_smem.at[slot, own], layout=hopper.PER_ROW)
        plgpu.barrier_arrive(free.at[slot])
        return hopper.promote(sums, value, [by_row * scale for scale in scales])

    return (hopper.accumulate(steps, start, finish, hopper.zeros(tiling.n), tiling.overlap),)


def drain(free, step, tiling):
    """Waits until the neighbour has released every stage too: its arrivals must not find this block gone."""
    if tiling.pair:

        def one(i, step):
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(tiling.stages))])
            return step + 1

        lax.fori_loop(0, tiling.stages, one, step)


def wgrad(lhs, rhs, group_sizes, *, out_dtype, promote: bool = True, accumulate=None):
    """`out[g] = lhs[:, rows of g] @ rhs[:, rows of g].T`; zero for an empty group."""
    from pallas_kernels.fp8_grouped_matmul import mosaic_gpu_wgrad

    options = dict(out_dtype=out_dtype, promote=promote, accumulate=accumulate)
    return mosaic_gpu_wgrad.wgrad(lhs, rhs, group_sizes, **options)

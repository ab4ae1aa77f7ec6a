"""The weight gradient of `grouped_matmul` for Hopper: `out[g] = lhs[rows of g].T @ dout[rows of g]`.

The rows are the contraction, so a group's product runs over `ceil(size / 64)` stages, none for an empty
group. Both operands are read as they lie, transposed by the tensor cores. The first and the last stage
of a group may hold rows of its neighbours: those are zeroed in shared memory, in both operands, so that
not even an infinity gets across.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import hopper, mosaic_gpu, schedule
from pallas_kernels.grouped_matmul.mosaic_gpu import (
    FETCH_REGISTERS,
    FETCHER,
    MULTIPLY_REGISTERS,
    ROWS,
    STEP,
    Tiling,
)


def wgrad(lhs, dout, group_sizes, *, out_dtype, tiling: Tiling | None = None):
    """`out[g] = lhs[rows of g].T @ dout[rows of g]`; zero for an empty group."""
    k, n = lhs.shape[1], dout.shape[1]
    lhs, dout = mosaic_gpu.pad_to(lhs, (8, STEP)), mosaic_gpu.pad_to(dout, (8, STEP))
    table = schedule.groups_by_size(group_sizes)
    out = _wgrad(table, lhs, dout, jnp.dtype(out_dtype), tiling or Tiling())
    return out if out.shape[1:] == (k, n) else out[:, :k, :n]


def _wgrad(table, lhs, dout, out_dtype, tiling: Tiling):
    store_columns = hopper.ROW_BYTES // out_dtype.itemsize
    operand, result = hopper.swizzled(lhs.dtype), hopper.swizzled(out_dtype)
    kernel = plgpu.kernel(
        functools.partial(_wgrad_kernel, tiling=tiling),
        out_type=jax.ShapeDtypeStruct((table.shape[0], lhs.shape[1], dout.shape[1]), out_dtype),
        grid=(mosaic_gpu.multiprocessors(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            left_smem=plgpu.SMEM((tiling.stages, STEP, ROWS), lhs.dtype, transforms=operand),
            right_smem=plgpu.SMEM((tiling.stages, STEP, tiling.n), lhs.dtype, transforms=operand),
            out_smem=plgpu.SMEM((2, 2, hopper.WARPGROUP_ROWS, store_columns), out_dtype, transforms=result),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            cleared=plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="grouped_matmul_wgrad",
    )
    return kernel(table, lhs, dout)


def _wgrad_kernel(table, lhs, dout, out, *, left_smem, right_smem, out_smem, full, free, cleared, tiling):
    groups, out_rows, columns = out.shape
    grid = pl.cdiv(out_rows, ROWS), pl.cdiv(columns, tiling.n)
    warpgroup = lax.axis_index("wg")

    def each_tile(body):
        """Runs `body(step, group, row, column, steps)`; `step` counts stages since the kernel began."""

        @plgpu.nd_loop((groups, grid[0] * grid[1]), collective_axes="sm", init_carry=jnp.int32(0))
        def _(info, carry):
            place, tile = info.index
            row_tile, column_tile = plgpu.planar_snake(tile, grid, 0, tiling.band)
            group, start, end = (table[place, i] for i in range(3))
            first = start // schedule.ALIGN * schedule.ALIGN
            steps = jnp.where(end > start, (end - first + STEP - 1) // STEP, 0)
            return body(carry, (group, first, start, end), row_tile * ROWS, column_tile * tiling.n, steps)

    def fetcher():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

        @each_tile
        def _(step, group, row, column, steps):
            first = group[1]

            def fetch(i, step):
                slot = lax.rem(step, jnp.int32(tiling.stages))
                plgpu.barrier_wait(free.at[slot])
                at = pl.ds(first + i * STEP, STEP)
                plgpu.copy_gmem_to_smem(lhs.at[at, pl.ds(row, ROWS)], left_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    dout.at[at, pl.ds(column, tiling.n)], right_smem.at[slot], full.at[slot]
                )
                return step + 1

            return lax.fori_loop(0, steps, fetch, step)

    def multiplier():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        mosaic_gpu.release_all(free, tiling.stages)
        left_part = pl.ds(warpgroup * hopper.WARPGROUP_ROWS, hopper.WARPGROUP_ROWS)
        right_part = pl.ds(warpgroup * (tiling.n // 2), tiling.n // 2)

        @each_tile
        def _(step, group, row, column, steps):
            group, first, start, end = group

            def accumulate(acc):
                def multiply(slot, i):
                    low, high = start - (first + i * STEP), end - (first + i * STEP)

                    @pl.when((low > 0) | (high < STEP))
                    def _():
                        # Each warpgroup clears its own rows of the product and half of the columns.
                        hopper.clear_rows(left_smem.at[slot, :, left_part], low, high)
                        hopper.clear_rows(right_smem.at[slot, :, right_part], low, high)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(cleared)
                        plgpu.barrier_wait(cleared)

                    left = left_smem.at[slot, :, left_part]
                    plgpu.wgmma(acc, left.transpose((1, 0)), right_smem.at[slot])

                return mosaic_gpu.consume(acc, multiply, step, steps, full, free, tiling.stages)

            value = pl.run_scoped(accumulate, plgpu.ACC((hopper.WARPGROUP_ROWS, tiling.n)))
            _store(value, out.at[group], out_smem.at[warpgroup], row, warpgroup, column)
            return step + steps

        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == FETCHER, fetcher, multiplier)


def _store(value, out, out_smem, row, warpgroup, column):
    width = out_smem.shape[-1]
    rows = pl.ds(row + warpgroup * hopper.WARPGROUP_ROWS, hopper.WARPGROUP_ROWS)
    for i in range(value.shape[1] // width):
        block = out_smem.at[i % 2]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        block[...] = value[:, i * width : (i + 1) * width].astype(out.dtype)
        plgpu.commit_smem()
        at = column + i * width
        # What lies past the last row the copy engine leaves out by itself.
        plgpu.copy_smem_to_gmem(block, out.at[rows, pl.ds(at, width)], predicate=at < out.shape[1])

"""`grouped_matmul` for Hopper, in Pallas Mosaic GPU: bf16 (or f16) operands, float32 accumulation.

One persistent kernel a product. A warpgroup fetches operand tiles with the tensor copy engine into a
ring of shared-memory stages; two more multiply them, 64 rows each, and store the result. The ring runs
on across tiles, so the next tile's operands arrive while this one is stored. Both layouts of the
weights are read as they lie.

- forward, dgrad: `schedule.row_tiles` cuts the rows into tiles that stay within a group. Full
  tiles leave through the copy engine, a group's ragged ends by row (`hopper.store_rows`).
- wgrad (`mosaic_gpu_wgrad.py`): one output matrix a group, the rows are the contraction.

Needs a compute capability 9.0 GPU and JAX 0.11.2. Rows, k and n that are no multiples of (8, 64, 64)
are padded, which copies the operands.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations
from pallas_kernels.grouped_matmul import hopper, schedule

MULTIPROCESSORS = 132  # H100 and H200 SXM; compiled for when there is no GPU to ask.


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel cuts its work.

    Attributes:
      n: columns of a tile. Its rows are 128, 64 for each of the two multiplying warpgroups.
      stages: operand tiles in flight.
      band: row tiles that are visited together, column by column, to reuse operands from the L2 cache.
    """

    n: int = 256
    stages: int = 4
    band: int = 4


ROWS = 2 * hopper.WARPGROUP_ROWS
STEP = 64  # Contraction of one stage: 128 bytes, the widest swizzle.
FETCHER = 2  # The warpgroup that loads; 0 and 1 multiply.
FETCH_REGISTERS, MULTIPLY_REGISTERS = 40, 232


def tiling_for(rows: int, groups: int, transpose_rhs: bool) -> Tiling:
    """The tiling for operands of these shapes.

    A band of four row tiles of groups that have fewer than three each wants the weights of several groups at
    a time. With transposed weights that cost 1 to 7% at 288 rows a group; at 512 bands gained 1 to 4%. What
    lies between was not measured, and forward the two are within 3%.
    """
    return Tiling(band=1 if transpose_rhs and rows < 3 * ROWS * groups else 4)


def multiprocessors() -> int:
    """Multiprocessors of the GPU at hand."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else MULTIPROCESSORS


def unsupported(lhs, rhs, transpose_rhs) -> str | None:
    """Why this implementation cannot run the call, or None."""
    del transpose_rhs
    if jax.__version_info__ < (0, 11, 2):
        return f"JAX {jax.__version__} is older than 0.11.2: install dsv3-jax[gpu] on Python 3.12"
    if implementations.platform() != "gpu":
        return f"it runs on NVIDIA Hopper, not on {implementations.platform()}: take 'blocked'"
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        return f"compute capability {jax.devices()[0].compute_capability}, it needs 9.0: take 'reference'"
    if lhs.dtype != rhs.dtype or lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"lhs {lhs.dtype} and rhs {rhs.dtype}: cast both to bfloat16"
    return None


def pad_to(x, multiples):
    """Pads the trailing dimensions of `x` with zeros to the given multiples."""
    widths = [(0, 0)] * (x.ndim - len(multiples)) + [
        (0, -size % multiple) for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)
    ]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def forward(lhs, rhs, group_sizes, *, transpose_rhs, out_dtype, tiling: Tiling | None = None):
    """`out[r] = lhs[r] @ rhs[group of r]`; rows past the sum of the sizes are zero."""
    rows, n = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    lhs, rhs = pad_to(lhs, (8, STEP)), pad_to(rhs, (STEP, STEP))
    tiles, count = schedule.row_tiles(group_sizes, lhs.shape[0], ROWS)
    tiling = tiling or tiling_for(rows, rhs.shape[0], transpose_rhs)
    out = _forward(tiles, count, lhs, rhs, transpose_rhs, jnp.dtype(out_dtype), tiling)
    return out if out.shape == (rows, n) else out[:rows, :n]


def wgrad(lhs, dout, group_sizes, *, out_dtype):
    """`out[g] = lhs[rows of g].T @ dout[rows of g]`; zero for an empty group."""
    from pallas_kernels.grouped_matmul import mosaic_gpu_wgrad

    return mosaic_gpu_wgrad.wgrad(lhs, dout, group_sizes, out_dtype=out_dtype)


def _forward(tiles, count, lhs, rhs, transpose_rhs: bool, out_dtype, tiling: Tiling):
    n = rhs.shape[1 if transpose_rhs else 2]
    store_columns = hopper.ROW_BYTES // out_dtype.itemsize
    operand, result = hopper.swizzled(lhs.dtype), hopper.swizzled(out_dtype)
    right = (tiling.n, STEP) if transpose_rhs else (STEP, tiling.n)
    kernel = plgpu.kernel(
        functools.partial(_forward_kernel, transpose_rhs=transpose_rhs, tiling=tiling),
        out_type=jax.ShapeDtypeStruct((lhs.shape[0], n), out_dtype),
        grid=(multiprocessors(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            left_smem=plgpu.SMEM((tiling.stages, ROWS, STEP), lhs.dtype, transforms=operand),
            right_smem=plgpu.SMEM((tiling.stages, *right), lhs.dtype, transforms=operand),
            out_smem=plgpu.SMEM((2, 2, hopper.WARPGROUP_ROWS, store_columns), out_dtype, transforms=result),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="grouped_matmul",
    )
    return kernel(tiles, count, lhs, rhs)


def _forward_kernel(
    tiles, count, lhs, rhs, out, *, left_smem, right_smem, out_smem, full, free, transpose_rhs, tiling
):
    groups, depth, columns = rhs.shape[0], lhs.shape[1], out.shape[1]
    column_tiles = pl.cdiv(columns, tiling.n)
    row_tiles = count[0]
    warpgroup = lax.axis_index("wg")

    def each_tile(body):
        """Runs `body(step, tile, column, steps)`; `step` counts stages since the kernel began."""

        @plgpu.nd_loop((row_tiles * column_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
        def _(info, carry):
            row_tile, column = plgpu.planar_snake(info.index[0], (row_tiles, column_tiles), 0, tiling.band)
            tile = [tiles[row_tile, i] for i in range(4)]
            # The rows past the sum of the sizes are a group without weights: nothing to multiply.
            steps = jnp.where(tile[0] < groups, depth // STEP, 0)
            return body(carry, tile, column * tiling.n, steps)

    def fetcher():
        plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

        @each_tile
        def _(step, tile, column, steps):
            group, start, _, _ = tile

            def fetch(i, step):
                slot = lax.rem(step, jnp.int32(tiling.stages))
                plgpu.barrier_wait(free.at[slot])
                at, across = pl.ds(i * STEP, STEP), pl.ds(column, tiling.n)
                plgpu.copy_gmem_to_smem(lhs.at[pl.ds(start, ROWS), at], left_smem.at[slot], full.at[slot])
                right = rhs.at[group, across, at] if transpose_rhs else rhs.at[group, at, across]
                plgpu.copy_gmem_to_smem(right, right_smem.at[slot], full.at[slot])
                return step + 1

            return lax.fori_loop(0, steps, fetch, step)

    def multiplier():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        release_all(free, tiling.stages)

        @each_tile
        def _(step, tile, column, steps):
            _, start, low, high = tile
            first = start + warpgroup * hopper.WARPGROUP_ROWS

            def product():
                def accumulate(acc):
                    def multiply(slot, _):
                        right = right_smem.at[slot]
                        left = left_smem.at[
                            slot, pl.ds(warpgroup * hopper.WARPGROUP_ROWS, hopper.WARPGROUP_ROWS)
                        ]
                        plgpu.wgmma(acc, left, right.transpose((1, 0)) if transpose_rhs else right)

                    return consume(acc, multiply, step, steps, full, free, tiling.stages)

                value = pl.run_scoped(accumulate, plgpu.ACC((hopper.WARPGROUP_ROWS, tiling.n)))
                store(value, out, out_smem.at[warpgroup], first, low, high, column)

            def nothing():  # The other warpgroup has the tensor cores to itself.
                def skip(i, step):
                    slot = lax.rem(step, jnp.int32(tiling.stages))
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(free.at[slot])
                    return step + 1

                lax.fori_loop(0, steps, skip, step)

            lax.cond((first < high) & (first + hopper.WARPGROUP_ROWS > low), product, nothing)
            return step + steps

        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == FETCHER, fetcher, multiplier)


def release_all(free, stages: int):
    """Marks every stage as free, so that the fetcher waits the same way for each."""
    for slot in range(stages):
        plgpu.barrier_arrive(free.at[slot])


def consume(acc, multiply, step, steps, full, free, stages: int):
    """Runs `multiply(slot, i)` over `steps` stages and returns the sum; one product is always in flight."""

    def one(i, step):
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(full.at[slot])
        multiply(slot, i)
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(free.at[lax.rem(step + stages - 1, jnp.int32(stages))], predicate=i > 0)
        return step + 1

    last = lax.fori_loop(0, steps, one, step)
    value = acc[...]
    plgpu.barrier_arrive(free.at[lax.rem(last + stages - 1, jnp.int32(stages))], predicate=steps > 0)
    return value


def store(value, out, out_smem, first, low, high, column):
    """Stores a warpgroup's product at rows `first`.. and columns `column`.., rows `[low, high)` only."""
    buffers, _, width = out_smem.shape
    whole = (first >= low) & (first + hopper.WARPGROUP_ROWS <= high)
    for i in range(value.shape[1] // width):
        block = out_smem.at[i % buffers]
        at = column + i * width
        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        block[...] = value[:, i * width : (i + 1) * width].astype(out.dtype)
        plgpu.commit_smem()

        def boxed(block=block, at=at):
            rows = pl.ds(first, hopper.WARPGROUP_ROWS)
            # The copy engine leaves out what lies past the last column, but not if it knows only one tile.
            plgpu.copy_smem_to_gmem(block, out.at[rows, pl.ds(at, width)], predicate=at < out.shape[1])

        def by_row(block=block, at=at):
            hopper.store_rows(block, out, first, low, high, at)
            plgpu.commit_smem_to_gmem_group()  # An empty group, so that the waits above count the same.

        lax.cond(whole, boxed, by_row)

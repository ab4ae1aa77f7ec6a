"""FP8 products for TPU, in Pallas Mosaic TPU: row-scaled by block-scaled operands, dense or in groups.

Every 128 of the contraction is a product of its own, summed in float32, then scaled and added. TPU7x
multiplies E4M3 as it is. Older chips do not: there FP8 is how operands are stored and moved, and the kernel
widens them to bfloat16, which holds every FP8 number exactly. Either way the products are exact.

Forward and dgrad: a tile of rows that several groups share is visited once for each, one after the other, and
every visit stores the rows of its own group. Weight gradients: a group starts at a multiple of 128 rows, so
each 128 of the contraction belongs to one group; the sum is stored when the group changes. Group sizes are
read on the device.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import implementations
from pallas_kernels.fp8_quantize import TILE

ROWS, COLUMNS = 256, 256  # Of a tile of the result.
_WIDEST = 512  # Rows and columns of a tile of a weight gradient.
_ALIGN = 32  # Rows of FP8 in one register tile.
_VMEM_BYTES = 48 << 20
_DEEPEST = 16384  # Contraction: 8 MB an operand's tile, and two tiles of each.


def native() -> bool:
    """Whether the chip that is compiled for multiplies E4M3: TPU7x and later."""
    return pltpu.get_tpu_info().generation >= 7


def unsupported(lhs, rhs) -> str | None:
    """Why this implementation cannot run the call, or None."""
    if implementations.platform() != "tpu":
        return f"it runs on TPU, not on {implementations.platform()}: take 'reference' or 'mosaic_gpu'"
    depth = lhs.values.shape[1]
    by_row = rhs.scales.shape == (-(-depth // TILE), rhs.values.shape[0])
    if depth > _DEEPEST and not by_row:
        return f"a contraction of {depth}, more than {_DEEPEST}: take 'bf16'"
    return None


def _padded(x, *multiples: int):
    """The last dimensions filled up with zeros to multiples."""
    widths = [(0, 0)] * (x.ndim - len(multiples))
    widths += [(0, -size % to) for size, to in zip(x.shape[-len(multiples) :], multiples, strict=True)]
    return jnp.pad(x, widths)


def _visits(group_sizes, tile: int, rows: int):
    """Which rows each visit stores: int32 [most visits, 4] of (group, tile, first row, row past the last).

    Also how many visits there are. Groups in order, and within a group its tiles.
    """
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    first = starts // tile
    count = jnp.where(group_sizes > 0, (ends - 1) // tile - first + 1, 0)
    after = jnp.cumsum(count)
    visit = jnp.arange(rows // tile + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(visit[:, None] >= after[None, :], axis=1), groups - 1)
    at = jnp.minimum(first[group] + visit - (after - count)[group], rows // tile - 1)
    table = jnp.stack([group, at, starts[group], ends[group]], axis=1).astype(jnp.int32)
    return table, after[-1].astype(jnp.int32)


def forward(lhs, rhs, group_sizes, *, out_dtype, multiply_fp8: bool | None = None, interpret=False):
    """`out[r] = lhs[r] @ rhs[group of r].T`; rows past the sum of the sizes are zero."""
    m, n = lhs.values.shape[0], rhs.values.shape[1]
    out = _product(lhs, rhs, group_sizes, out_dtype, multiply_fp8, interpret)
    return jnp.where(jnp.arange(m)[:, None] < jnp.sum(group_sizes), out[:m, :n], 0)


def dense(lhs, rhs, *, out_dtype, multiply_fp8: bool | None = None, interpret=False):
    """`lhs @ rhs.T`: one group."""
    (m, _), (n, _) = lhs.values.shape, rhs.values.shape
    one = type(rhs)(rhs.values[None], rhs.scales[None])
    return _product(lhs, one, None, out_dtype, multiply_fp8, interpret)[:m, :n]


def _product(lhs, rhs, group_sizes, out_dtype, multiply_fp8, interpret):
    multiply_fp8 = native() if multiply_fp8 is None else multiply_fp8
    (m, k), (groups, n, _) = lhs.values.shape, rhs.values.shape
    rows, columns = min(ROWS, m + -m % _ALIGN), min(COLUMNS, n + -n % TILE)
    steps = -(-k // TILE)
    left, by_row = _padded(lhs.values, rows, TILE), _padded(lhs.scales.T, rows, 1)
    right = _padded(rhs.values, columns, TILE)
    blocks = _padded(rhs.scales, columns // TILE, 1).reshape(groups, -1, columns // TILE, steps)
    tiles = left.shape[0] // rows
    table, visits = _visits(jnp.asarray([m]) if group_sizes is None else group_sizes, rows, left.shape[0])
    return pl.pallas_call(
        functools.partial(_forward_kernel, steps=steps, multiply_fp8=multiply_fp8),
        out_shape=jax.ShapeDtypeStruct((left.shape[0], right.shape[1]), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(right.shape[1] // columns, tiles if group_sizes is None else visits),
            in_specs=[
                pl.BlockSpec((rows, steps * TILE), lambda j, i, table: (table[i, 1], 0)),
                pl.BlockSpec((rows, steps), lambda j, i, table: (table[i, 1], 0)),
                pl.BlockSpec((None, columns, steps * TILE), lambda j, i, table: (table[i, 0], j, 0)),
                pl.BlockSpec(
                    (None, None, columns // TILE, steps), lambda j, i, table: (table[i, 0], j, 0, 0)
                ),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda j, i, table: (table[i, 1], j)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="fp8_grouped_matmul_tpu",
    )(table, left, by_row, right, blocks)


def _forward_kernel(table, left, by_row, right, by_block, out, *, steps, multiply_fp8):
    rows, columns = out.shape
    visit = pl.program_id(1)
    low, high = table[visit, 2], table[visit, 3]
    step_of_row = lax.broadcasted_iota(jnp.int32, by_row.shape, 1)
    step_of_block = lax.broadcasted_iota(jnp.int32, by_block.shape, 1)
    block_of = lax.broadcasted_iota(jnp.int32, (1, columns), 1) // TILE

    def one(i, sums):
        at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
        product = _multiplied(left[:, at], right[:, at], multiply_fp8)
        # One column of scales, taken out of its row by a mask: lanes cannot be indexed.
        row_scale = jnp.sum(jnp.where(step_of_row == i, by_row[...], 0.0), axis=1, keepdims=True)
        of_blocks = jnp.sum(jnp.where(step_of_block == i, by_block[...], 0.0), axis=1, keepdims=True)
        column_scale = jnp.zeros((1, columns), jnp.float32)
        for block in range(columns // TILE):
            column_scale = jnp.where(block_of == block, of_blocks[block : block + 1], column_scale)
        return sums + product * (row_scale * column_scale)

    sums = lax.fori_loop(0, steps, one, jnp.zeros((rows, columns), jnp.float32))
    row = table[visit, 1] * rows + lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
    # What an earlier visit of this tile stored is still here.
    out[...] = jnp.where((row >= low) & (row < high), sums.astype(out.dtype), out[...])


def _multiplied(left, right, multiply_fp8: bool):
    """`left @ right.T` of FP8 tiles in float32, as they are or widened to bfloat16: exact either way."""
    operand = left.dtype if multiply_fp8 else jnp.bfloat16
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(
        left.astype(operand), right.astype(operand), contract, preferred_element_type=jnp.float32
    )


def wgrad(lhs, rhs, group_sizes, *, out_dtype, multiply_fp8: bool | None = None, interpret=False):
    """`out[g] = lhs[:, rows of g] @ rhs[:, rows of g].T`; zero for an empty group."""
    multiply_fp8 = native() if multiply_fp8 is None else multiply_fp8
    (m, depth), n, groups = lhs.values.shape, rhs.values.shape[0], group_sizes.shape[0]
    steps = depth // TILE
    rows, columns = min(_WIDEST, m + -m % TILE), min(_WIDEST, n + -n % TILE)
    left, right = _padded(lhs.values, rows, 1), _padded(rhs.values, columns, 1)
    chunk = min(steps, TILE)  # Steps whose row scales are fetched together.
    by_row = _padded(lhs.scales.T, rows, chunk)
    by_column = _padded(rhs.scales, 1, columns)[:, None]
    # Of each step; those past the last group are zeros, and go to any.
    last = jnp.cumsum(-(-group_sizes // TILE))
    group = jnp.sum(jnp.arange(steps)[:, None] >= last[None, :], axis=1)
    owner = jnp.where(group < groups, group, jnp.argmax(last)).astype(jnp.int32)
    out = pl.pallas_call(
        functools.partial(_wgrad_kernel, chunk=chunk, multiply_fp8=multiply_fp8),
        out_shape=jax.ShapeDtypeStruct((groups, left.shape[0], right.shape[0]), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(left.shape[0] // rows, right.shape[0] // columns, steps),
            in_specs=[
                pl.BlockSpec((rows, TILE), lambda i, j, s, owner: (i, s)),
                pl.BlockSpec((rows, chunk), lambda i, j, s, owner: (i, s // chunk)),
                pl.BlockSpec((columns, TILE), lambda i, j, s, owner: (j, s)),
                pl.BlockSpec((None, 1, columns), lambda i, j, s, owner: (s, 0, j)),
            ],
            out_specs=pl.BlockSpec((None, rows, columns), lambda i, j, s, owner: (owner[s], i, j)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="fp8_grouped_wgrad_tpu",
    )(owner, left, by_row, right, by_column)
    return jnp.where(group_sizes[:, None, None] > 0, out[:, :m, :n], 0)


def _wgrad_kernel(owner, left, by_row, right, by_column, out, sums, *, chunk, multiply_fp8):
    step, steps = pl.program_id(2), pl.num_programs(2)
    before, after = jnp.maximum(step - 1, 0), jnp.minimum(step + 1, steps - 1)

    @pl.when((step == 0) | (owner[step] != owner[before]))
    def _():
        sums[...] = jnp.zeros_like(sums)

    of_step = lax.broadcasted_iota(jnp.int32, by_row.shape, 1) == step % chunk
    row_scale = jnp.sum(jnp.where(of_step, by_row[...], 0.0), axis=1, keepdims=True)
    product = _multiplied(left[...], right[...], multiply_fp8)
    sums[...] += product * (row_scale * by_column[...])

    @pl.when((step == steps - 1) | (owner[step] != owner[after]))
    def _():
        out[...] = sums[...].astype(out.dtype)

"""Device code that Pallas has no words for: rows of a swizzled shared-memory tile, one by one.

The tensor copy engine moves whole boxes. At a group's edge some rows of a tile belong to a neighbour:
`store_rows` writes only the rows in a range, `clear_rows` zeroes all others before they are multiplied.
Both address the 128-byte swizzled layout directly: row `r` of a tile is 128 bytes, and its 16-byte
piece `p` lies at piece `p ^ (r % 8)`.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

ROW_BYTES = 128  # One row of a swizzled tile.
PIECE_BYTES = 16  # What one thread moves at once.
PIECES = ROW_BYTES // PIECE_BYTES
WARPGROUP = 128
WARPGROUP_ROWS = 64  # Rows of a warpgroup's product.

_SCALAR = plgpu.Layout.WG_SPLAT(())


def swizzled(dtype, row_bytes: int = ROW_BYTES) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The shared-memory layout of operands and results: swizzled tiles of 8 rows of 128 bytes or fewer."""
    columns = row_bytes // jnp.dtype(dtype).itemsize
    tiles = plgpu.TilingTransform((8, columns))  # pyright: ignore[reportAbstractUsage]
    return tiles, plgpu.SwizzleTransform(row_bytes)  # pyright: ignore[reportAbstractUsage]


def _i32(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _lane():
    return arith.remui(mgpu.utils.thread_idx(), _i32(WARPGROUP))


def _pieces():
    return ir.VectorType.get((PIECE_BYTES // 4,), ir.IntegerType.get_signless(32))


def _less(a, b):
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _at(pointer, offset):
    i8 = ir.IntegerType.get_signless(8)
    return mgpu.utils.getelementptr(pointer, [offset], i8)


def store_rows(smem, gmem, first_row, low, high, first_column):
    """Writes the rows `[low, high)` of a one-tile-wide block to `gmem`, 16 bytes a thread, coalesced.

    Args:
      smem: `[64, 128 bytes]`, swizzled; it holds rows `first_row` onwards.
      gmem: `[rows, columns]`.
      first_row, low, high, first_column: int32 scalars, in rows and columns of `gmem`.
    """
    itemsize = jnp.dtype(smem.dtype).itemsize
    columns = gmem.shape[-1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(smem.dtype)), plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR, _SCALAR)
    )
    def store(_, smem, gmem, first_row, low, high, first_column):
        first_row, low, high, first_column = (
            x.registers.item() for x in (first_row, low, high, first_column)
        )
        i64 = ir.IntegerType.get_signless(64)
        source, target = mgpu.utils.memref_ptr(smem), mgpu.utils.memref_ptr(gmem)
        for i in range(WARPGROUP_ROWS * PIECES // WARPGROUP):
            index = arith.addi(_lane(), _i32(i * WARPGROUP))
            row, piece = arith.divui(index, _i32(PIECES)), arith.remui(index, _i32(PIECES))
            place = arith.xori(piece, arith.remui(row, _i32(8)))
            offset = arith.addi(arith.muli(row, _i32(ROW_BYTES)), arith.muli(place, _i32(PIECE_BYTES)))
            to_row = arith.addi(first_row, row)
            to_column = arith.addi(first_column, arith.muli(piece, _i32(PIECE_BYTES // itemsize)))
            wanted = arith.andi(
                arith.andi(_less(to_row, high), arith.cmpi(arith.CmpIPredicate.sge, to_row, low)),
                _less(to_column, _i32(columns)),
            )
            with mgpu.utils.when(wanted):
                element = arith.addi(
                    arith.muli(arith.extsi(i64, to_row), arith.constant(i64, columns)),
                    arith.extsi(i64, to_column),
                )
                to = _at(target, arith.muli(element, arith.constant(i64, itemsize)))
                llvm.store(llvm.load(_pieces(), _at(source, offset), alignment=16), to, alignment=16)

    store(smem, gmem, first_row, low, high, first_column)  # pyright: ignore[reportCallIssue]


def clear_rows(smem, low, high):
    """Zeroes all rows of a swizzled block `[64, columns]` but `[low, high)`, counted within the block."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(smem.dtype)), _SCALAR, _SCALAR))
    def clear(_, smem, low, high):
        low, high = low.registers.item(), high.registers.item()
        kind = ir.MemRefType(smem.type)
        _, tiles, _, _ = kind.shape
        (eight_rows, tile, _, _), _ = kind.get_strides_and_offset()
        itemsize = mgpu.utils.bytewidth(kind.element_type)
        base = mgpu.utils.memref_ptr(smem)
        zero = llvm.mlir_zero(_pieces())
        for i in range(tiles * WARPGROUP_ROWS * PIECES // WARPGROUP):
            index = arith.addi(_lane(), _i32(i * WARPGROUP))
            piece = arith.remui(index, _i32(PIECES))
            row = arith.remui(arith.divui(index, _i32(PIECES)), _i32(WARPGROUP_ROWS))
            column = i * WARPGROUP // (PIECES * WARPGROUP_ROWS)  # Which tile: the same for all threads.
            offset = arith.addi(
                arith.addi(
                    arith.muli(arith.divui(row, _i32(8)), _i32(eight_rows * itemsize)),
                    arith.muli(arith.remui(row, _i32(8)), _i32(ROW_BYTES)),
                ),
                arith.addi(arith.muli(piece, _i32(PIECE_BYTES)), _i32(column * tile * itemsize)),
            )
            with mgpu.utils.when(arith.ori(_less(row, low), arith.cmpi(arith.CmpIPredicate.sge, row, high))):
                llvm.store(zero, _at(base, offset), alignment=16)

    clear(smem, low, high)  # pyright: ignore[reportCallIssue]

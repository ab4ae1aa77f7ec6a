"""Transposes and quantises 128x1 tiles on Hopper.

Thread `t` of a warp holds columns `2t` and `2t + 1` of 64, and its warp 32 of the tile's 128 rows, so
that 16 rows of a column are one 16-byte piece of the transposed tile. The four warps meet once, to
agree on each column's largest magnitude. Pallas has no words for this exchange: it is written in
Mosaic GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.fp8_quantize.device import (
    ROWS,
    WARP,
    WARPS,
    address,
    float32,
    int32,
    magnitude,
    maximum,
    packed,
    ptx_name,
    scale_and_inverse,
    write_column,
)
from pallas_kernels.fp8_quantize.reference import TILE
from pallas_kernels.grouped_matmul.hopper import swizzled

COLUMNS = 64
_SCALAR = plgpu.Layout.WG_SPLAT(())


@functools.partial(jax.jit, static_argnames=("power_of_two", "dtype"))
def columns(values, scales, table, *, power_of_two, dtype):
    """See `mosaic_gpu.columns`; `table` is `reference.row_blocks`."""
    k, blocks = values.shape[1], table.shape[0]
    # Tiles that a block of threads fetches at once: FP8 tiles are half as large, too few bytes in flight.
    tiles = 1 if scales is None else TILE // COLUMNS
    operands = (table, values) if scales is None else (table, values, scales)
    kernel = plgpu.kernel(
        functools.partial(_kernel, power_of_two=power_of_two, scaled=scales is not None, tiles=tiles),
        out_type=(
            jax.ShapeDtypeStruct((k, blocks * TILE), dtype),
            jax.ShapeDtypeStruct((blocks, k), jnp.float32),
        ),
        grid=(blocks, k // COLUMNS // tiles),
        grid_names=("block", "column"),
        scratch_types=dict(
            x_smem=plgpu.SMEM((tiles, TILE, COLUMNS), values.dtype),
            in_scales_smem=plgpu.SMEM((TILE,), jnp.float32),
            amax_smem=plgpu.SMEM((tiles, WARPS, COLUMNS), jnp.float32),
            values_smem=plgpu.SMEM((tiles, COLUMNS, TILE), dtype, transforms=swizzled(dtype)),
            scales_smem=plgpu.SMEM((tiles, COLUMNS), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=1, num_barriers=tiles),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="fp8_quantize_columns",
    )
    return kernel(*operands)


def _kernel(
    *refs, power_of_two, scaled, tiles,
    x_smem, in_scales_smem, amax_smem, values_smem, scales_smem, loaded,
):  # fmt: skip
    table, x, *in_scales, values, scales = refs
    block, first = lax.axis_index("block"), lax.axis_index("column") * tiles
    start, valid = table[block, 0], table[block, 1]
    across = [pl.ds((first + i) * COLUMNS, COLUMNS) for i in range(tiles)]
    for i in range(tiles):
        plgpu.copy_gmem_to_smem(x.at[pl.ds(start, TILE), across[i]], x_smem.at[i], loaded.at[i])
    if scaled:
        _fetch_scales(in_scales[0], in_scales_smem, first * COLUMNS // TILE, start, valid)
    largest = float(jnp.finfo(values.dtype).max)
    for i in range(tiles):
        plgpu.barrier_wait(loaded.at[i])
        mine = (smem.at[i] for smem in (amax_smem, values_smem, scales_smem))
        _transpose(x_smem.at[i], in_scales_smem, *mine, valid, largest, power_of_two, scaled)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem.at[i], values.at[across[i], pl.ds(block * TILE, TILE)])
        plgpu.copy_smem_to_gmem(scales_smem.at[i], scales.at[block, across[i]])
    plgpu.wait_smem_to_gmem(0)


def _fetch_scales(scales, smem, row, start, valid):
    """One scale a thread: a group starts at any row, where the copy engine may not."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR))
    def fetch(_, scales, smem, row, start, valid):
        row, start, valid = (x.registers.item() for x in (row, start, valid))
        width = ir.MemRefType(scales.type).shape[1]
        thread = arith.remui(mgpu.utils.thread_idx(), int32(WARP * WARPS))
        # Past the group's last row, its own first scale: the row is cleared and its scale too.
        inside = arith.cmpi(arith.CmpIPredicate.slt, thread, valid)
        own = arith.addi(start, arith.select(inside, thread, int32(0)))
        i64 = ir.IntegerType.get_signless(64)
        element = arith.addi(
            arith.muli(arith.extsi(i64, row), arith.constant(i64, width)), arith.extsi(i64, own)
        )
        source = address(mgpu.utils.memref_ptr(scales), arith.muli(element, arith.constant(i64, 4)))
        scale = llvm.load(ir.F32Type.get(), source, alignment=4)
        llvm.store(scale, address(mgpu.utils.memref_ptr(smem), arith.muli(thread, int32(4))), alignment=4)
        mgpu.utils.warpgroup_barrier()

    fetch(scales, smem, row, start, valid)  # pyright: ignore[reportCallIssue]


def _transpose(x, in_scales, amax, values, scales, valid, largest, power_of_two, scaled):
    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.RefType(),
            plgpu.RefType(),
            plgpu.RefType(swizzled(values.dtype)),
            plgpu.RefType(),
            _SCALAR,
        )
    )
    def run(_, x, in_scales, amax, values, scales, valid):
        thread = arith.remui(mgpu.utils.thread_idx(), int32(WARP * WARPS))
        lane, warp = arith.remui(thread, int32(WARP)), arith.divui(thread, int32(WARP))
        first_row = arith.muli(warp, int32(ROWS))
        size = mgpu.utils.bytewidth(ir.MemRefType(x.type).element_type)
        offset = arith.addi(arith.muli(first_row, int32(COLUMNS * size)), arith.muli(lane, int32(2 * size)))
        pairs = address(mgpu.utils.memref_ptr(x), offset)
        of_rows = None
        if scaled:
            of_rows = address(mgpu.utils.memref_ptr(in_scales), arith.muli(first_row, int32(4)))
        valid = valid.registers.item()
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.slt, valid, int32(TILE))):
            _clear(pairs, of_rows, size, first_row, valid)
        held = _read(pairs, of_rows, size)
        tops = [functools.reduce(maximum, (magnitude(pair[c]) for pair in held)) for c in range(2)]
        tops = _agree(tops, mgpu.utils.memref_ptr(amax), lane, warp)
        pairs = [scale_and_inverse(top, largest, power_of_two) for top in tops]
        base = mgpu.utils.memref_ptr(values)
        name = ptx_name(values)
        for c in range(2):
            scaled_rows = [arith.mulf(pair[c], pairs[c][1]) for pair in held]
            write_column(base, scaled_rows, name, arith.addi(arith.muli(lane, int32(2)), int32(c)), warp)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, warp, int32(0))):
            both = packed([scale for scale, _ in pairs], ir.F32Type.get())
            place = address(mgpu.utils.memref_ptr(scales), arith.muli(lane, int32(8)))
            llvm.store(both, place, alignment=8)

    run(x, in_scales, amax, values, scales, valid)  # pyright: ignore[reportCallIssue]


def _clear(pairs, scales, size, first_row, valid):
    """Zeroes what this thread is about to read of the rows from `valid` on, and their scales."""
    word = ir.IntegerType.get_signless(16 * size)
    zero = arith.constant(word, ir.IntegerAttr.get(word, 0))
    for i in range(ROWS):
        past = arith.cmpi(arith.CmpIPredicate.sge, arith.addi(first_row, int32(i)), valid)
        with mgpu.utils.when(past):
            llvm.store(zero, address(pairs, int32(i * COLUMNS * size)), alignment=2 * size)
            if scales is not None:
                llvm.store(float32(0.0), address(scales, int32(4 * i)), alignment=4)


def _read(pairs, scales, size):
    """This thread's 32 rows of two columns, float32."""
    f32, i32, held = ir.F32Type.get(), ir.IntegerType.get_signless(32), []
    word = ir.IntegerType.get_signless(16 * size)
    for i in range(ROWS):
        raw = llvm.load(word, address(pairs, int32(i * COLUMNS * size)), alignment=2 * size)
        if scales is None:
            pair = [arith.shli(raw, int32(16)), arith.andi(raw, int32(-65536))]
            held.append([llvm.bitcast(f32, half) for half in pair])
            continue
        pair = llvm.inline_asm(i32, [raw], "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", asm_dialect=0)
        pair = llvm.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), pair)
        pair = [vector.extract(pair, dynamic_position=[], static_position=[c]) for c in range(2)]
        scale = llvm.load(f32, address(scales, int32(4 * i)), alignment=4)
        held.append([arith.mulf(arith.extf(f32, half), scale) for half in pair])
    return held


def _agree(tops, base, lane, warp):
    """The maximum over the four warps."""
    offset = arith.addi(arith.muli(warp, int32(COLUMNS * 4)), arith.muli(lane, int32(8)))
    f32 = ir.F32Type.get()
    llvm.store(packed(tops, f32), address(base, offset), alignment=8)
    mgpu.utils.warpgroup_barrier()
    for other in range(WARPS):
        place = address(base, arith.addi(arith.muli(lane, int32(8)), int32(other * COLUMNS * 4)))
        theirs = llvm.load(ir.VectorType.get((2,), f32), place, alignment=8)
        tops = [
            maximum(top, vector.extract(theirs, dynamic_position=[], static_position=[c]))
            for c, top in enumerate(tops)
        ]
    return tops

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
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_kernels.fp8_quantize.reference import SMALLEST_SCALE, TILE
from pallas_kernels.grouped_matmul.hopper import PIECE_BYTES, ROW_BYTES, swizzled

COLUMNS = 64
WARP, WARPS = 32, 4
ROWS = TILE // WARPS  # Rows of a thread.
_SCALAR = plgpu.Layout.WG_SPLAT(())


def columns(values, scales, table, *, power_of_two, dtype):
    """See `mosaic_gpu.columns`; `table` is `reference.row_blocks`."""
    k, blocks = values.shape[1], table.shape[0]
    operands = (table, values) if scales is None else (table, values, scales)
    kernel = plgpu.kernel(
        functools.partial(_kernel, power_of_two=power_of_two, scaled=scales is not None),
        out_type=(
            jax.ShapeDtypeStruct((k, blocks * TILE), dtype),
            jax.ShapeDtypeStruct((blocks, k), jnp.float32),
        ),
        grid=(blocks, k // COLUMNS),
        grid_names=("block", "column"),
        scratch_types=dict(
            x_smem=plgpu.SMEM((TILE, COLUMNS), values.dtype),
            in_scales_smem=plgpu.SMEM((TILE,), jnp.float32),
            amax_smem=plgpu.SMEM((WARPS, COLUMNS), jnp.float32),
            values_smem=plgpu.SMEM((COLUMNS, TILE), dtype, transforms=swizzled(dtype)),
            scales_smem=plgpu.SMEM((COLUMNS,), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=1),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="fp8_quantize_columns",
    )
    return kernel(*operands)


def _kernel(*refs, power_of_two, scaled, x_smem, in_scales_smem, amax_smem, values_smem, scales_smem, loaded):
    table, x, *in_scales, values, scales = refs
    block, column = lax.axis_index("block"), lax.axis_index("column")
    across = pl.ds(column * COLUMNS, COLUMNS)
    start, valid = table[block, 0], table[block, 1]
    plgpu.copy_gmem_to_smem(x.at[pl.ds(start, TILE), across], x_smem, loaded)
    if scaled:
        _fetch_scales(in_scales[0], in_scales_smem, column * COLUMNS // TILE, start, valid)
    plgpu.barrier_wait(loaded)
    largest = float(jnp.finfo(values.dtype).max)
    _transpose(
        x_smem, in_scales_smem, amax_smem, values_smem, scales_smem, valid, largest, power_of_two, scaled
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values.at[across, pl.ds(block * TILE, TILE)])
    plgpu.copy_smem_to_gmem(scales_smem, scales.at[block, across])
    plgpu.wait_smem_to_gmem(0)


def _fetch_scales(scales, smem, row, start, valid):
    """One scale a thread: a group starts at any row, where the copy engine may not."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR))
    def fetch(_, scales, smem, row, start, valid):
        row, start, valid = (x.registers.item() for x in (row, start, valid))
        width = ir.MemRefType(scales.type).shape[1]
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(WARP * WARPS))
        # Past the group's last row, its own first scale: the row is cleared and its scale too.
        inside = arith.cmpi(arith.CmpIPredicate.slt, thread, valid)
        own = arith.addi(start, arith.select(inside, thread, _i32(0)))
        i64 = ir.IntegerType.get_signless(64)
        element = arith.addi(
            arith.muli(arith.extsi(i64, row), arith.constant(i64, width)), arith.extsi(i64, own)
        )
        source = _at(mgpu.utils.memref_ptr(scales), arith.muli(element, arith.constant(i64, 4)))
        scale = llvm.load(ir.F32Type.get(), source, alignment=4)
        llvm.store(scale, _at(mgpu.utils.memref_ptr(smem), arith.muli(thread, _i32(4))), alignment=4)
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
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(WARP * WARPS))
        lane, warp = arith.remui(thread, _i32(WARP)), arith.divui(thread, _i32(WARP))
        first_row = arith.muli(warp, _i32(ROWS))
        size = mgpu.utils.bytewidth(ir.MemRefType(x.type).element_type)
        offset = arith.addi(arith.muli(first_row, _i32(COLUMNS * size)), arith.muli(lane, _i32(2 * size)))
        pairs = _at(mgpu.utils.memref_ptr(x), offset)
        of_rows = _at(mgpu.utils.memref_ptr(in_scales), arith.muli(first_row, _i32(4))) if scaled else None
        valid = valid.registers.item()
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.slt, valid, _i32(TILE))):
            _clear(pairs, of_rows, size, first_row, valid)
        held = _read(pairs, of_rows, size)
        tops = [functools.reduce(_maximum, (_abs(pair[c]) for pair in held)) for c in range(2)]
        tops = _agree(tops, mgpu.utils.memref_ptr(amax), lane, warp)
        pairs = [_scale_and_inverse(top, largest, power_of_two) for top in tops]
        base = mgpu.utils.memref_ptr(values)
        name = "e4m3" if isinstance(ir.MemRefType(values.type).element_type, ir.Float8E4M3FNType) else "e5m2"
        for c in range(2):
            scaled_rows = [arith.mulf(pair[c], pairs[c][1]) for pair in held]
            _write(base, scaled_rows, name, arith.addi(arith.muli(lane, _i32(2)), _i32(c)), warp)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, warp, _i32(0))):
            both = _vector([scale for scale, _ in pairs], ir.F32Type.get())
            at = _at(mgpu.utils.memref_ptr(scales), arith.muli(lane, _i32(8)))
            llvm.store(both, at, alignment=8)

    run(x, in_scales, amax, values, scales, valid)  # pyright: ignore[reportCallIssue]


def _clear(pairs, scales, size, first_row, valid):
    """Zeroes what this thread is about to read of the rows from `valid` on, and their scales."""
    word = ir.IntegerType.get_signless(16 * size)
    zero = arith.constant(word, ir.IntegerAttr.get(word, 0))
    for i in range(ROWS):
        past = arith.cmpi(arith.CmpIPredicate.sge, arith.addi(first_row, _i32(i)), valid)
        with mgpu.utils.when(past):
            llvm.store(zero, _at(pairs, _i32(i * COLUMNS * size)), alignment=2 * size)
            if scales is not None:
                llvm.store(_f32(0.0), _at(scales, _i32(4 * i)), alignment=4)


def _read(pairs, scales, size):
    """This thread's 32 rows of two columns, float32."""
    f32, i32, held = ir.F32Type.get(), ir.IntegerType.get_signless(32), []
    word = ir.IntegerType.get_signless(16 * size)
    for i in range(ROWS):
        raw = llvm.load(word, _at(pairs, _i32(i * COLUMNS * size)), alignment=2 * size)
        if scales is None:
            pair = [arith.shli(raw, _i32(16)), arith.andi(raw, _i32(-65536))]
            held.append([llvm.bitcast(f32, half) for half in pair])
            continue
        pair = llvm.inline_asm(i32, [raw], "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", asm_dialect=0)
        pair = llvm.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), pair)
        pair = [vector.extract(pair, dynamic_position=[], static_position=[c]) for c in range(2)]
        scale = llvm.load(f32, _at(scales, _i32(4 * i)), alignment=4)
        held.append([arith.mulf(arith.extf(f32, half), scale) for half in pair])
    return held


def _agree(tops, base, lane, warp):
    """The maximum over the four warps."""
    offset = arith.addi(arith.muli(warp, _i32(COLUMNS * 4)), arith.muli(lane, _i32(8)))
    f32 = ir.F32Type.get()
    llvm.store(_vector(tops, f32), _at(base, offset), alignment=8)
    mgpu.utils.warpgroup_barrier()
    for other in range(WARPS):
        at = _at(base, arith.addi(arith.muli(lane, _i32(8)), _i32(other * COLUMNS * 4)))
        theirs = llvm.load(ir.VectorType.get((2,), f32), at, alignment=8)
        tops = [
            _maximum(top, vector.extract(theirs, dynamic_position=[], static_position=[c]))
            for c, top in enumerate(tops)
        ]
    return tops


def _write(base, rows, name, column, warp):
    """This thread's 32 rows of one column, in 16-byte pieces of the swizzled transposed tile."""
    i32 = ir.IntegerType.get_signless(32)
    for piece in range(ROWS // PIECE_BYTES):
        words = []
        for word in range(PIECE_BYTES // 4):
            four = rows[piece * PIECE_BYTES + 4 * word :][:4]
            words.append(
                llvm.inline_asm(
                    i32,
                    four,
                    "{ .reg .b16 l, h; "
                    f"cvt.rn.satfinite.{name}x2.f32 l, $2, $1; cvt.rn.satfinite.{name}x2.f32 h, $4, $3; "
                    "mov.b32 $0, {l, h}; }",
                    "=r,f,f,f,f",
                    asm_dialect=0,
                )
            )
        index = arith.addi(arith.muli(warp, _i32(ROWS // PIECE_BYTES)), _i32(piece))
        place = arith.xori(index, arith.remui(column, _i32(8)))
        offset = arith.addi(arith.muli(column, _i32(ROW_BYTES)), arith.muli(place, _i32(PIECE_BYTES)))
        llvm.store(_vector(words, i32), _at(base, offset), alignment=16)


def _scale_and_inverse(amax, largest: float, power_of_two: bool):
    """`reference.scale_and_inverse` on one register."""
    scale = _maximum(arith.mulf(amax, _f32(1 / largest)), _f32(SMALLEST_SCALE))
    if not power_of_two:
        inverse = arith.divf(_f32(largest), _maximum(amax, _f32(SMALLEST_SCALE)))
        return scale, arith.minimumf(inverse, _f32(1 / SMALLEST_SCALE))
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    bits = arith.andi(arith.addi(llvm.bitcast(i32, scale), _i32(0x007FFFFF)), _i32(0x7F800000))
    inverse = arith.subi(_i32(0x7F000000), bits)
    finite, nan = arith.cmpf(arith.CmpFPredicate.OLT, amax, _f32(float("inf"))), _f32(float("nan"))
    return tuple(arith.select(finite, llvm.bitcast(f32, x), nan) for x in (bits, inverse))


def _i32(value: int):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def _f32(value: float):
    f32 = ir.F32Type.get()
    return arith.constant(f32, ir.FloatAttr.get(f32, value))


def _maximum(a, b):
    return arith.maximumf(a, b)  # Of anything and NaN it is NaN.


def _abs(a):
    return math.absf(a)


def _vector(values, kind):
    out = llvm.mlir_undef(ir.VectorType.get((len(values),), kind))
    for i, value in enumerate(values):
        out = llvm.insertelement(out, value, _i32(i))
    return out


def _at(pointer, offset):
    return mgpu.utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))

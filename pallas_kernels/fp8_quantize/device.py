"""Device code that the quantising kernels share, in Mosaic GPU: what one thread does with its registers.

A warp's threads hold pairs of columns, and its threads the same rows: 16 rows of a column are one 16-byte
piece of the transposed tile.
"""

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math

from pallas_kernels.fp8_quantize.reference import SMALLEST_SCALE, TILE
from pallas_kernels.grouped_matmul.hopper import PIECE_BYTES, ROW_BYTES

WARP, WARPS = 32, 4
ROWS = TILE // WARPS  # Rows of a thread.


def ptx_name(ref) -> str:
    """What PTX calls the FP8 type of a memory."""
    return "e4m3" if isinstance(ir.MemRefType(ref.type).element_type, ir.Float8E4M3FNType) else "e5m2"


def write_column(base, rows, name, column, warp):
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
        index = arith.addi(arith.muli(warp, int32(ROWS // PIECE_BYTES)), int32(piece))
        place = arith.xori(index, arith.remui(column, int32(8)))
        offset = arith.addi(arith.muli(column, int32(ROW_BYTES)), arith.muli(place, int32(PIECE_BYTES)))
        llvm.store(packed(words, i32), address(base, offset), alignment=16)


def scale_and_inverse(amax, largest: float, power_of_two: bool):
    """`reference.scale_and_inverse` on one register."""
    scale = maximum(arith.mulf(amax, float32(1 / largest)), float32(SMALLEST_SCALE))
    if not power_of_two:
        inverse = arith.divf(float32(largest), maximum(amax, float32(SMALLEST_SCALE)))
        return scale, arith.minimumf(inverse, float32(1 / SMALLEST_SCALE))
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    bits = arith.andi(arith.addi(llvm.bitcast(i32, scale), int32(0x007FFFFF)), int32(0x7F800000))
    inverse = arith.subi(int32(0x7F000000), bits)
    finite, nan = arith.cmpf(arith.CmpFPredicate.OLT, amax, float32(float("inf"))), float32(float("nan"))
    return tuple(arith.select(finite, llvm.bitcast(f32, x), nan) for x in (bits, inverse))


def int32(value: int):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def float32(value: float):
    f32 = ir.F32Type.get()
    return arith.constant(f32, ir.FloatAttr.get(f32, value))


def maximum(a, b):
    return arith.maximumf(a, b)  # Of anything and NaN it is NaN.


def magnitude(a):
    return math.absf(a)


def packed(values, kind):
    out = llvm.mlir_undef(ir.VectorType.get((len(values),), kind))
    for i, value in enumerate(values):
        out = llvm.insertelement(out, value, int32(i))
    return out


def address(pointer, offset):
    return mgpu.utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))

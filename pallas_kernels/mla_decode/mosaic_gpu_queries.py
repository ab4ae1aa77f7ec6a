"""Decoding attention for Hopper in Pallas Mosaic GPU: queries in float16, to multiply with codes."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_WARPS = 4  # of a program; each takes a row
_LANES = 32
_WORD = 4  # bytes, of two numbers
_PLAIN = plgpu.RefType()


def to_half(q):
    """Queries in float16, in the order of columns of converted codes, and each row's factor.

    XLA takes three kernels for it; this is one, in which a warp holds a row in its registers.

    Args:
      q: bf16 `[batch, rows, width]`, rows a multiple of 4 and width one of 64.

    Returns:
      float16 `[batch, rows, width]`, columns as `mosaic_gpu_registers.convert` leaves them, and float32
      factors `[batch, rows]`: powers of 2 of which a row's largest number is 2^10 to 2^11.
    """
    batch, rows, width = q.shape

    def kernel(q, half, factor):
        program = lax.axis_index("program")

        @plgpu.inline_mgpu(arg_types=(_PLAIN, _PLAIN, _PLAIN, plgpu.Layout.WG_SPLAT))
        def run(_, q, half, factor, program):
            _row_of_warp(width, q, half, factor, program.registers[()])

        run(q, half, factor, program)

    call = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((batch * rows, width), jnp.float16),
            jax.ShapeDtypeStruct((batch * rows,), jnp.float32),
        ],
        grid=(batch * rows // _WARPS,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="mla_decode_queries",
    )
    half, factor = call(q.reshape(-1, width))
    return half.reshape(q.shape), factor.reshape(batch, rows)


def _row_of_warp(width, q, half, factor, program):
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

    def number(value):
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def at(ref, *offsets):
        """The address so many bytes after the start."""
        total = offsets[0]
        for offset in offsets[1:]:
            total = arith.addi(total, offset)
        return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [total], ir.IntegerType.get_signless(8))

    thread = mgpu.utils.thread_idx()
    lane, warp = arith.remui(thread, number(_LANES)), arith.divui(thread, number(_LANES))
    row = arith.addi(arith.muli(program, number(_WARPS)), warp)
    start = arith.muli(row, number(2 * width))
    parts = [number(_WORD * _LANES * i) for i in range(width // 64)]
    mine = arith.muli(lane, number(_WORD))
    words = [llvm.load(i32, at(q, start, mine, part)) for part in parts]

    # Numbers without their signs order as integers do; a bf16 is the upper half of a float32.
    largest = number(0)
    for word in words:
        for bits in (word, arith.shrui(word, number(16))):
            largest = arith.maxui(largest, arith.andi(bits, number(0x7FFF)))
    largest = mgpu.utils.inline_ptx(
        "redux.sync.max.u32 $0, $1, 0xffffffff;", largest, result_types=i32, has_side_effects=True
    )
    power = arith.andi(arith.shli(largest, number(16)), number(0x7F800000))  # of 2, at most the largest
    power = arith.minsi(arith.maxsi(power, number(27 << 23)), number(227 << 23))  # 2^-100, 2^100
    scale = arith.subi(power, number(10 << 23))
    inverse = arith.bitcast(f32, arith.subi(number(254 << 23), scale))

    # Of 64 columns, in pairs: pair 8 a + b goes to 4 b + a.
    a, b = arith.divui(lane, number(8)), arith.remui(lane, number(8))
    place = arith.muli(arith.addi(arith.muli(b, number(4)), a), number(_WORD))
    for word, part in zip(words, parts, strict=True):
        two = arith.shli(word, number(16)), arith.andi(word, number(-65536))
        low, high = (arith.mulf(arith.bitcast(f32, x), inverse) for x in two)
        both = mgpu.utils.inline_ptx("cvt.rn.f16x2.f32 $0, $1, $2;", high, low, result_types=i32)
        llvm.store(both, at(half, start, place, part))
    with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, number(0))):
        llvm.store(scale, at(factor, arith.muli(row, number(_WORD))))

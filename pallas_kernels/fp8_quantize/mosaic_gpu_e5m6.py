"""Packs numbers to twelve bits (E5M6) and unpacks them on Hopper: one read and one write.

A group of four warps takes tiles of 64 rows and 128 columns, from copy engine to copy engine. A thread
holds two rows of a tile, of each four pieces of eight neighbours: twelve bytes packed. Instructions are
scarce, integer ones twice as much: bfloat16 is packed two numbers at a time, and rounding is an addition.

That addition: with `2^e` the power of two below `v`, or 2^-14 if that is larger, a sum `v + 2^e C` whose
last bit counts `2^(e-6)` is rounded to nearest even where E5M6 ends, of subnormal numbers too. It ends in
`q = round(v / 2^(e-6))`, above that is its exponent, and the code of `v` is `q + 64 (e + 14)`. To start
with, `v` is multiplied by the power of two for which all constants cancel, modulo the code's 11 bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_kernels.fp8_quantize.device import (
    WARP,
    WARPS,
    address,
    float32,
    int32,
    magnitude,
    maximum,
    packed,
    scale_and_inverse,
)
from pallas_kernels.fp8_quantize.e5m6 import LARGEST
from pallas_kernels.fp8_quantize.reference import TILE
from pallas_kernels.grouped_matmul.hopper import WARPGROUP_ROWS

BYTES = TILE * 3 // 2  # Of a tile's row, packed.
_PIECE = 8  # Neighbours that a thread packs at once: three words.
_QUAD = 4  # Threads of a row.
_WARP_ROWS = WARPGROUP_ROWS // WARPS

_CODES = 0x07FF07FF  # Two numbers in a word, without their signs.
_MAGNITUDES = 0x7FFF7FFF
_LOW_12 = 0xFFF
_INFINITE = 65536.0  # And what lies beyond: its code is infinity's.
# Multiples of `v` for which the constants cancel, see above: C is 2 for bfloat16, 2^17 for float32.
_BF16_UP, _F32_UP = 2.0**13, 2.0**-2


@functools.partial(jax.jit, static_argnames="scaled")
def pack(x, *, scaled):
    """`[rows, k]` to uint8 `[rows, k * 3 / 2]`, and scales `[k/128, rows]` or None."""
    rows, k = x.shape
    # The copy engine cuts a tile's numbers at the last row, but not its scales: they get room.
    room = rows + -rows % WARPGROUP_ROWS
    out = [jax.ShapeDtypeStruct((rows, k // TILE * BYTES), jnp.uint8)]
    if scaled:
        out.append(jax.ShapeDtypeStruct((k // TILE, room), jnp.float32))
    values, *scales = _kernel(_pack_kernel, out, rows, k, x.dtype, scaled, 1, "pack_e5m6")(x)
    return values, scales[0][:, :rows] if scaled else None


@functools.partial(jax.jit, static_argnames="dtype")
def unpack(values, scales, *, dtype):
    """The inverse, times the scales if there are any."""
    rows, k = values.shape[0], values.shape[1] // BYTES * TILE
    out, scaled = jax.ShapeDtypeStruct((rows, k), dtype), scales is not None
    kernel = _kernel(_unpack_kernel, out, rows, k, dtype, scaled, 1 + scaled, "unpack_e5m6")
    return kernel(values, scales) if scaled else kernel(values)


def _kernel(body, out, rows, k, dtype, scaled, copies, name):
    """A kernel of tiles of numbers in `dtype`, fetched in so many copies each."""
    tiles = 2 if k // TILE % 2 == 0 else 1  # Of one block of threads.
    # Numbers and what they are packed to share their memory, so that more blocks fit in: a tile is in
    # registers when its result is written.
    ours = [plgpu.SMEM((WARPGROUP_ROWS, BYTES), jnp.uint8)]
    ours += [plgpu.SMEM((WARPGROUP_ROWS,), jnp.float32)] if scaled else []
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(pl.cdiv(rows, WARPGROUP_ROWS), k // TILE // tiles),
        grid_names=("row", "column"),
        scratch_types=dict(
            tiles=[plgpu.RefUnion(plgpu.SMEM((WARPGROUP_ROWS, TILE), dtype), ours) for _ in range(tiles)],
            loaded=plgpu.Barrier(num_arrivals=copies, num_barriers=tiles),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=name,
    )


def _pack_kernel(x, values, *scales, tiles, loaded):
    down = pl.ds(lax.axis_index("row") * WARPGROUP_ROWS, WARPGROUP_ROWS)
    first = lax.axis_index("column") * len(tiles)
    for i, (x_smem, _) in enumerate(tiles):
        plgpu.copy_gmem_to_smem(x.at[down, pl.ds((first + i) * TILE, TILE)], x_smem, loaded.at[i])
    for i, (x_smem, (values_smem, *scales_smem)) in enumerate(tiles):
        plgpu.barrier_wait(loaded.at[i])
        _pack_tile(x_smem, values_smem, *scales_smem)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem, values.at[down, pl.ds((first + i) * BYTES, BYTES)])
        for smem, gmem in zip(scales_smem, scales, strict=True):
            plgpu.copy_smem_to_gmem(smem, gmem.at[first + i, down])
    plgpu.wait_smem_to_gmem(0)


def _unpack_kernel(values, *refs, tiles, loaded):
    *scales, x = refs
    down = pl.ds(lax.axis_index("row") * WARPGROUP_ROWS, WARPGROUP_ROWS)
    first = lax.axis_index("column") * len(tiles)
    for i, (_, (values_smem, *scales_smem)) in enumerate(tiles):
        across = pl.ds((first + i) * BYTES, BYTES)
        plgpu.copy_gmem_to_smem(values.at[down, across], values_smem, loaded.at[i])
        for gmem, smem in zip(scales, scales_smem, strict=True):
            plgpu.copy_gmem_to_smem(gmem.at[first + i, down], smem, loaded.at[i])
    for i, (x_smem, (values_smem, *scales_smem)) in enumerate(tiles):
        plgpu.barrier_wait(loaded.at[i])
        _unpack_tile(values_smem, x_smem, *scales_smem)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_smem, x.at[down, pl.ds((first + i) * TILE, TILE)])
    plgpu.wait_smem_to_gmem(0)


def _places():
    """This thread's two rows of a tile, and its four pieces of each.

    Four threads share a row. They start at a piece that depends on the row, so that neither the threads of
    a warp that store words of packed numbers nor the eight that move 16 bytes at a time meet in a bank.
    """
    thread = arith.remui(mgpu.utils.thread_idx(), int32(WARP * WARPS))
    lane, warp = arith.remui(thread, int32(WARP)), arith.divui(thread, int32(WARP))
    row, quad = arith.divui(lane, int32(_QUAD)), arith.remui(lane, int32(_QUAD))
    first = arith.addi(row, arith.divui(row, int32(2)))
    row = arith.addi(row, arith.muli(warp, int32(_WARP_ROWS)))
    rows = [row, arith.addi(row, int32(_WARP_ROWS // 2))]
    turns = TILE // _PIECE // _QUAD
    pieces = []
    for turn in range(turns):
        group = arith.remui(arith.addi(first, int32(turn)), int32(turns))
        pieces.append(arith.addi(arith.muli(group, int32(_QUAD)), quad))
    return rows, pieces


def _pack_tile(x, values, *scales):
    # Lists of MLIR values: of rows, of their pieces, of a piece's words.
    pairs, up = (_bf16_pair, _BF16_UP) if x.dtype == jnp.bfloat16 else (_f32_pair, _F32_UP)
    number_bytes = jnp.dtype(x.dtype).itemsize

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(scales)))
    def run(_, x, values, *scales):
        rows, pieces = _places()
        source, target = mgpu.utils.memref_ptr(x), mgpu.utils.memref_ptr(values)
        held = [[_load_numbers(source, row, piece, number_bytes) for piece in pieces] for row in rows]
        mgpu.utils.warpgroup_barrier()  # The results lie where the numbers lay.
        for row, row_words in zip(rows, held, strict=True):
            factor, bad = float32(up), None
            if scales:
                top = _over_quad((_bf16_top if number_bytes == 2 else _f32_top)(sum(row_words, [])))
                scale, inverse = scale_and_inverse(top, LARGEST, True)
                factor = arith.mulf(inverse, factor)
                finite = arith.cmpf(arith.CmpFPredicate.OLT, top, float32(float("inf")))
                bad = arith.select(finite, int32(0), int32(-1))
                # Four threads write the same.
                place = address(mgpu.utils.memref_ptr(scales[0]), arith.muli(row, int32(4)))
                llvm.store(scale, place, alignment=4)
            for piece, words in zip(pieces, row_words, strict=True):
                per_pair = len(words) // (_PIECE // 2)
                fields = [
                    _join(*pairs(words[i : i + per_pair], factor, bad))
                    for i in range(0, len(words), per_pair)
                ]
                own = _packed_address(target, row, piece)
                for i, word in enumerate(_bytes_together(fields)):
                    llvm.store(word, address(own, int32(4 * i)), alignment=4)

    run(x, values, *scales)  # pyright: ignore[reportCallIssue]


def _load_numbers(base, row, piece, number_bytes):
    """The words of eight neighbours."""
    kind = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
    own = _number_address(base, row, piece, number_bytes)
    words = []
    for half in range(_PIECE * number_bytes // 16):
        four = llvm.load(kind, address(own, int32(16 * half)), alignment=16)
        words += [vector.extract(four, dynamic_position=[], static_position=[i]) for i in range(4)]
    return words


def _number_address(base, row, piece, number_bytes):
    offset = arith.muli(
        arith.addi(arith.muli(row, int32(TILE // _PIECE)), piece), int32(_PIECE * number_bytes)
    )
    return address(base, offset)


def _packed_address(base, row, piece):
    return address(base, arith.addi(arith.muli(row, int32(BYTES)), arith.muli(piece, int32(_PIECE * 3 // 2))))


def _bf16_top(words):
    """The largest magnitude of pairs, float32; NaN if one is."""
    top = functools.reduce(
        functools.partial(_bf16x2, "max.NaN"), (arith.andi(word, int32(_MAGNITUDES)) for word in words)
    )
    return maximum(*map(_as_float, (arith.shli(top, int32(16)), arith.andi(top, int32(-65536)))))


def _f32_top(words):
    return functools.reduce(maximum, (magnitude(_as_float(word)) for word in words))


def _over_quad(top):
    for distance in (1, 2):
        top = maximum(top, mgpu.utils.shfl_bfly(top, distance))
    return top


def _bf16_pair(words, factor, bad):
    """Two codes in the halves of a word, their signs in the top bits of another, and where there is a NaN.

    Above a code and below a sign lies anything.
    """
    (word,) = words
    v = arith.andi(word, int32(_MAGNITUDES))
    if bad is None:
        bad = _prmt(arith.addi(v, int32(0x007F007F)), v, 0xBB99)  # The top bit of each half, everywhere.
        v = _bf16x2("min", v, _constant_twice(_INFINITE))
    v = _bf16x2("mul.rn", v, _twice(factor))
    power = _bf16x2("max", v, _constant_twice(2.0**-14 * _BF16_UP))
    power = arith.andi(power, int32(0x7F807F80))
    total = _bf16x2("fma.rn", power, _constant_twice(2.0), v)
    # Its exponent counts 128, and in the code 64.
    return arith.subi(total, arith.shrui(power, int32(1))), word, bad


def _f32_pair(words, factor, bad):
    """As `_bf16_pair`."""
    codes, top_bits = [], []
    for word in words:
        v = magnitude(_as_float(word))
        if bad is None:
            top_bits.append(arith.addi(_as_int(v), int32(0x007FFFFF)))
            v = arith.minnumf(v, float32(_INFINITE))
        v = arith.mulf(v, factor)
        power = arith.andi(_as_int(arith.maxnumf(v, float32(2.0**-14 * _F32_UP))), int32(0x7F800000))
        total = _as_int(math.fma(_as_float(power), float32(2.0**17), v))
        codes.append(arith.addi(arith.shrui(total, int32(17)), total))
    bad = _prmt(*top_bits, 0xFFBB) if bad is None else bad
    return _prmt(*codes, 0x5410), _prmt(*words, 0x7632), bad


def _join(codes, signs, bad):
    """Two codes with their signs, next to each other in 24 bits. NaN is 0x7FF."""
    fields = _choose(int32(_CODES), codes, arith.shrui(signs, int32(4)))
    fields = _choose(bad, int32(_CODES), fields)
    return _choose(int32(_LOW_12), fields, arith.shrui(fields, int32(4)))


def _bytes_together(fields):
    """Four times 24 bits in three words."""
    return [_prmt(fields[i], fields[i + 1], order) for i, order in enumerate((0x4210, 0x5421, 0x6542))]


def _unpack_tile(values, x, *scales):
    dtype = jnp.dtype(x.dtype)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(scales)))
    def run(_, values, x, *scales):
        i32 = ir.IntegerType.get_signless(32)
        rows, pieces = _places()
        source, target = mgpu.utils.memref_ptr(values), mgpu.utils.memref_ptr(x)
        held, factors = [], []
        for row in rows:
            own = [_packed_address(source, row, piece) for piece in pieces]
            held.append(
                [[llvm.load(i32, address(at, int32(4 * i)), alignment=4) for i in range(3)] for at in own]
            )
            if scales:
                place = address(mgpu.utils.memref_ptr(scales[0]), arith.muli(row, int32(4)))
                factors.append(llvm.load(ir.F32Type.get(), place, alignment=4))
        mgpu.utils.warpgroup_barrier()  # The numbers lie where these lay.
        for i, row in enumerate(rows):
            for piece, words in zip(pieces, held[i], strict=True):
                pairs = [_converted(pair, dtype, factors[i : i + 1]) for pair in _halves(words)]
                own = _number_address(target, row, piece, dtype.itemsize)
                words = sum(pairs, [])
                for at in range(0, len(words), 4):
                    llvm.store(packed(words[at : at + 4], i32), address(own, int32(4 * at)), alignment=16)

    run(values, x, *scales)  # pyright: ignore[reportCallIssue]


def _halves(words):
    """Eight float16 in four words."""
    a, b, c = words
    out = []
    for low, high, order in ((a, a, 0x2110), (a, b, 0x5443), (b, c, 0x4332), (c, c, 0x3221)):
        # The second of the two now lies where it belongs, the first four bits too low.
        both = _prmt(low, high, order)
        both = _choose(int32(0xFFFF), arith.shli(both, int32(4)), both)
        out.append(arith.andi(both, int32(-0x000F0010)))
    return out


def _converted(pair, dtype, factor):
    """Words of two float16 in another dtype, times the factor if there is one."""
    if dtype == jnp.float16 and not factor:
        return [pair]
    f32 = ir.F32Type.get()
    pair = llvm.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), pair)
    numbers = [
        arith.extf(f32, vector.extract(pair, dynamic_position=[], static_position=[i])) for i in range(2)
    ]
    numbers = [arith.mulf(number, factor[0]) if factor else number for number in numbers]
    if dtype == jnp.float32:
        return [_as_int(number) for number in numbers]
    name = "bf16" if dtype == jnp.bfloat16 else "f16"
    return [_ptx(f"cvt.rn.{name}x2.f32 $0, $2, $1;", "f", *numbers)]


def _as_int(x):
    return llvm.bitcast(ir.IntegerType.get_signless(32), x)


def _as_float(x):
    return llvm.bitcast(ir.F32Type.get(), x)


def _twice(x):
    """A float32 that bfloat16 holds, in both halves of a word."""
    return _prmt(_as_int(x), _as_int(x), 0x3232)


def _constant_twice(x: float):
    return int32(int(np.float32(x).view(np.int32)) // 0x10000 * 0x10001)


def _choose(mask, a, b):
    """The bits of `a` where the mask is set, and of `b` elsewhere: three operations, but one instruction."""
    return _ptx("lop3.b32 $0, $1, $2, $3, 0xCA;", "r", mask, a, b)


def _prmt(a, b, order: int):
    """Picks bytes of `a` (0 to 3) and `b` (4 to 7), the lowest digit first; from 8 on, the byte's top bit."""
    return _ptx(f"prmt.b32 $0, $1, $2, {order:#x};", "r", a, b)


def _bf16x2(instruction: str, *words):
    names = ", ".join(f"${i}" for i in range(1, len(words) + 1))
    return _ptx(f"{instruction}.bf16x2 $0, {names};", "r", *words)


def _ptx(text: str, register: str, *operands):
    """One instruction on registers of one kind; its result is a word."""
    registers = ",".join(["=r", *[register] * len(operands)])
    return llvm.inline_asm(ir.IntegerType.get_signless(32), operands, text, registers, asm_dialect=0)

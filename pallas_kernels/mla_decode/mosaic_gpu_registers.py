"""Decoding attention for Hopper: what is written on the registers of a thread, for few rows.

Of a product's `[64, 16]` result thread t of a warpgroup holds, with w = t / 32, i = (t % 32) / 4 and
j = t % 4, rows 16 w + i and 16 w + i + 8, in columns 2 j and 2 j + 1 of every 8. Operands in registers lie
likewise.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mla_attention import mosaic_gpu_common as common

ENTRIES = 64  # of the cache that a warpgroup holds at a time
CODES = 128  # columns of codes in a tile of shared memory, one byte each

_CODES = plgpu.RefType((plgpu.TilingTransform((8, CODES)), plgpu.SwizzleTransform(128)))
_TILED = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
_PLAIN = plgpu.RefType()


def entry_of_row(row):
    """The entry of the cache that a row of a product of converted codes stands for.

    Neighbouring rows are entries that differ in bits 0 and 2 of their number: then eight threads that load 16
    codes each, and store them as 16-bit numbers, meet in no bank of the shared memory.
    """
    return (row & ~7) | ((row & 7) >> 1) ^ (5 * (row & 1))


class _Thread:
    """Integers of this thread, as the compiler's values."""

    def __init__(self, permuted):
        thread = arith.remui(mgpu.utils.thread_idx(), _i32(128))
        lane = arith.remui(thread, _i32(32))
        self.number = thread
        self.warp = arith.divui(thread, _i32(32))
        self.j = arith.remui(lane, _i32(4))
        row = arith.divui(lane, _i32(4))
        if permuted:
            odd = arith.muli(arith.andi(row, _i32(1)), _i32(5))
            row = arith.xori(arith.shrui(row, _i32(1)), odd)
        self.entry = row  # of 8; entries 16 warp + entry, and + 8


def _i32(value):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def _sum(*terms):
    total = terms[0]
    for term in terms[1:]:
        total = arith.addi(total, term)
    return total


def _times(value, factor):
    return arith.muli(value, _i32(factor))


def _at(base, offset):
    return mgpu.utils.getelementptr(base, [offset], ir.IntegerType.get_signless(8))


def _pointer(ref):
    return mgpu.utils.memref_ptr(ref)


def _address(ref):
    """Of shared memory, in 32 bits."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), _pointer(ref))


def _scalar(register):
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, dynamic_position=[], static_position=[0])
    return register


# Four codes in a word to four float16 in two words, exactly. A signed byte plus 128 becomes the low bits of
# 1024 + it, from which 1152 is taken.
_TO_HALF = {
    jnp.dtype(jnp.float8_e4m3fn): (
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }"
    ),
    jnp.dtype(jnp.int8): (
        "{ .reg .b32 t, u, c; xor.b32 t, $2, 0x80808080; mov.b32 c, 0x64806480; "
        "prmt.b32 u, t, 0x64646464, 0x4140; sub.rn.f16x2 $0, u, c; "
        "prmt.b32 u, t, 0x64646464, 0x4342; sub.rn.f16x2 $1, u, c; }"
    ),
}


def convert(codes, values, dtype):
    """Codes `[64, width]` as float16 operands `[64, 64]` in registers, a tuple of width / 64 of them.

    Row r of an operand is entry `entry_of_row(r)`; of each 64 columns, pair 8 a + b lies at 4 b + a.

    Args:
      codes: bytes in shared memory, of width 128, or 64 without a layout of its own.
      values: float16 shared memory `[64, 128]` to write the numbers to as well, or None.
      dtype: int8 or float8_e4m3fn.
    """
    operand = plgpu.ShapeDtypeStruct((ENTRIES, 64), jnp.float16, common.MATRIX)
    width = codes.shape[-1]
    groups = width // 64
    refs = (codes,) if values is None else (codes, values)

    @plgpu.inline_mgpu(
        arg_types=(_PLAIN if width == 64 else _CODES, _TILED)[: len(refs)], return_type=(operand,) * groups
    )
    def run(_, codes, values=None):
        thread = _Thread(True)
        i32, f16 = ir.IntegerType.get_signless(32), ir.F16Type.get()
        pair, layout = ir.VectorType.get((2,), f16), common.MATRIX.to_mgpu()
        # Tiles of 8 entries take 8 * width bytes of codes, and 2048 of numbers: 1024 for each 64 columns.
        entry = _sum(_times(thread.warp, 16 * width), _times(thread.entry, width), _address(codes))
        target = _sum(_times(thread.warp, 4096), _times(thread.entry, 128))
        chunks = [arith.xori(arith.addi(_times(thread.j, 2), _i32(part)), thread.entry) for part in range(2)]
        targets = [] if values is None else [_sum(target, _times(x, 16), _address(values)) for x in chunks]
        made = [np.empty(layout.registers_shape((ENTRIES, 64)), object) for _ in range(groups)]
        places = [(group, half) for group in range(groups) for half in range(2)]
        loaded = []  # All ahead of the arithmetic: the compiler keeps these in order.
        for group, half in places:
            chunk = arith.addi(thread.j, _i32(4 * group))
            chunk = chunk if width == 64 else arith.xori(chunk, thread.entry)
            load = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {half * 8 * width}];"
            address = arith.addi(entry, _times(chunk, 16))
            loaded.append(
                mgpu.utils.inline_ptx(load, address, result_types=(i32,) * 4, has_side_effects=True)
            )
        for (group, half), four in zip(places, loaded, strict=True):
            words = []
            for word in four:
                words += mgpu.utils.inline_ptx(_TO_HALF[jnp.dtype(dtype)], word, result_types=(i32, i32))
            for block, word in enumerate(words):
                one = vector.broadcast(ir.VectorType.get((1,), i32), word)
                made[group][0, block, 0, 0, half, 0, 0, 0, 0] = vector.bitcast(pair, one)
            for part, address in enumerate(targets):
                store = f"st.shared.v4.b32 [$0 + {2048 * half + 1024 * group}], {{$1, $2, $3, $4}};"
                eight = words[4 * part : 4 * part + 4]
                mgpu.utils.inline_ptx(store, address, *eight, has_side_effects=True)
        made = [mgpu.FragmentedArray(_registers=x, _layout=layout, _is_signed=None) for x in made]
        return tuple(made)

    return run(*refs)


def per_entry(ref):
    """Reads one number an entry, `[64]` in shared memory, to the rows that stand for the entries."""
    result = plgpu.ShapeDtypeStruct((ENTRIES,), jnp.float32, common.PER_ROW)

    @plgpu.inline_mgpu(arg_types=(_PLAIN,), return_type=result)
    def run(_, ref):
        thread, layout, f32 = _Thread(True), common.PER_ROW.to_mgpu(), ir.F32Type.get()
        kind = layout.registers_element_type(f32)
        registers = np.empty(layout.registers_shape((ENTRIES,)), object)
        for half, index in enumerate(np.ndindex(registers.shape)):
            entry = _sum(_times(thread.warp, 16), thread.entry, _i32(8 * half))
            number = llvm.load(f32, _at(_pointer(ref), _times(entry, 4)))
            registers[index] = vector.broadcast(kind, number)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(ref)


def over_rows(matrix, scratch, operation):
    """The maximum (`operation` "max") or sum ("add") of each column of float32 `[64, 16]`.

    `scratch`, float32 `[64]` in shared memory, may be used again after a barrier of the warpgroup.
    """
    result = plgpu.ShapeDtypeStruct(matrix.shape[1:], matrix.dtype, common.PER_COLUMN)
    combine = {"max": arith.maximumf, "add": arith.addf}[operation]

    @plgpu.inline_mgpu(arg_types=(common.MATRIX, _PLAIN), return_type=result)
    def run(_, matrix, scratch):
        thread, base = _Thread(False), _pointer(scratch)
        layout, f32 = common.PER_COLUMN.to_mgpu(), ir.F32Type.get()
        two = ir.VectorType.get((2,), f32)
        first_rows = arith.cmpi(arith.CmpIPredicate.eq, thread.entry, _i32(0))
        place = arith.addi(_times(thread.warp, 64), _times(thread.j, 8))
        for block in range(matrix.registers.shape[1]):
            mine = combine(*(matrix.registers[0, block, 0, 0, half, 0, 0, 0, 0] for half in range(2)))
            elements = []
            for element in range(2):
                value = vector.extract(mine, dynamic_position=[], static_position=[element])
                for distance in (4, 8, 16):
                    value = combine(value, mgpu.utils.shfl_bfly(value, distance))
                elements.append(value)
            with mgpu.utils.when(first_rows):
                both = vector.from_elements(two, elements)
                llvm.store(both, _at(base, arith.addi(place, _i32(32 * block))), alignment=8)
        mgpu.utils.warpgroup_barrier()
        registers = np.empty(layout.registers_shape(matrix.shape[1:]), object)
        for block, index in enumerate(np.ndindex(registers.shape)):
            start = arith.addi(_times(thread.j, 8), _i32(32 * block))
            warps = [
                llvm.load(two, _at(base, arith.addi(start, _i32(64 * warp))), alignment=8)
                for warp in range(4)
            ]
            registers[index] = combine(combine(*warps[:2]), combine(*warps[2:]))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(matrix, scratch)


def store_weights(ref, weights, permuted):
    """Writes float32 `[64 entries, 16]` to 16-bit shared memory `[16, 64]`, rounded to its dtype.

    `permuted`: whether the rows stand for entries as `entry_of_row` says.
    """

    @plgpu.inline_mgpu(arg_types=(_TILED, common.MATRIX))
    def run(_, ref, weights):
        thread, base = _Thread(permuted), _pointer(ref)
        kind = ir.MemRefType(ref.type).element_type
        for index, register in np.ndenumerate(weights.registers):
            block, half = index[1], index[4]
            for element in range(2):
                column = arith.addi(_times(thread.j, 2), _i32(element))  # of 8
                value = vector.extract(register, dynamic_position=[], static_position=[element])
                chunk = arith.xori(arith.addi(_times(thread.warp, 2), _i32(half)), column)
                offset = _sum(_i32(1024 * block), _times(column, 128), _times(chunk, 16))
                offset = arith.addi(offset, _times(thread.entry, 2))
                llvm.store(arith.truncf(kind, value), _at(base, offset))

    run(ref, weights)


def _plain_or_tiled(ref):
    return _TILED if ref.dtype == jnp.float16 else _PLAIN


def put(ref, values):
    """Leaves a product's result in shared memory, in an order of its own, for `take` in another warpgroup."""

    @plgpu.inline_mgpu(arg_types=(_plain_or_tiled(ref), common.MATRIX))
    def run(_, ref, values):
        base = _at(_pointer(ref), _times(_Thread(False).number, 8))
        for i, register in enumerate(values.registers.flat):
            llvm.store(register, _at(base, _i32(1024 * i)), alignment=8)

    run(ref, values)


def take(ref, values):
    """`values` plus what `put` left."""
    result = plgpu.ShapeDtypeStruct(values.shape, values.dtype, common.MATRIX)

    @plgpu.inline_mgpu(arg_types=(_plain_or_tiled(ref), common.MATRIX), return_type=result)
    def run(_, ref, values):
        base = _at(_pointer(ref), _times(_Thread(False).number, 8))
        registers = np.empty_like(values.registers)
        for i, (index, register) in enumerate(np.ndenumerate(values.registers)):
            other = llvm.load(register.type, _at(base, _i32(1024 * i)), alignment=8)
            registers[index] = arith.addf(register, other)
        return mgpu.FragmentedArray(_registers=registers, _layout=values.layout, _is_signed=None)

    return run(ref, values)


def store_columns(ref, values, first_row, first_column):
    """Writes `[rank columns, 16]`, transposed, to rows of float32 `[rows, rank]` in global memory."""

    @plgpu.inline_mgpu(arg_types=(_PLAIN, common.MATRIX, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def run(_, ref, values, first_row, first_column):
        thread, f32 = _Thread(False), ir.F32Type.get()
        _, rank = ir.MemRefType(ref.type).shape
        row = arith.addi(_scalar(first_row.registers[()]), _times(thread.j, 2))
        column = _sum(_scalar(first_column.registers[()]), _times(thread.warp, 16), thread.entry)
        start = arith.addi(_times(row, rank), column)
        base = mgpu.utils.getelementptr(_pointer(ref), [start], f32)
        for index, register in np.ndenumerate(values.registers):
            tile, block, half = index[0], index[1], index[4]
            for element in range(2):
                offset = (8 * block + element) * rank + 64 * tile + 8 * half
                value = vector.extract(register, dynamic_position=[], static_position=[element])
                llvm.store(value, mgpu.utils.getelementptr(base, [_i32(offset)], f32))

    run(ref, values, first_row, first_column)

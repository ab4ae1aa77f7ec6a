"""Quantises 128x128 blocks of float32 weights on Hopper, as they lie or transposed: one read and one write.

A block is a group of four warps: each holds 32 of its rows, and a thread four of the columns, two
neighbours in each half. The threads meet once, to agree on the block's largest magnitude.
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
    int32,
    magnitude,
    maximum,
    ptx_name,
    scale_and_inverse,
    write_column,
)
from pallas_kernels.fp8_quantize.reference import TILE
from pallas_kernels.grouped_matmul.hopper import swizzled

HALF = TILE // 2
_SCALAR = plgpu.Layout.WG_SPLAT(())


@functools.partial(jax.jit, static_argnames=("power_of_two", "dtype", "transpose"))
def blocks(w, *, power_of_two, dtype, transpose):
    """Values `[stack, rows, k]` and scales `[stack, rows/128, k/128]`; of each `w.T` if `transpose`."""
    stack, rows, k = w.shape
    kernel = plgpu.kernel(
        functools.partial(_kernel, power_of_two=power_of_two, transpose=transpose),
        out_type=(
            jax.ShapeDtypeStruct((stack, k, rows) if transpose else w.shape, dtype),
            jax.ShapeDtypeStruct((stack, rows // TILE, k // TILE), jnp.float32),
        ),
        grid=(stack, rows // TILE, k // TILE),
        grid_names=("matrix", "row", "column"),
        scratch_types=dict(
            x_smem=plgpu.SMEM((TILE, TILE), w.dtype),
            amax_smem=plgpu.SMEM((WARP * WARPS,), jnp.float32),
            values_smem=plgpu.SMEM((TILE, TILE), dtype, transforms=swizzled(dtype) if transpose else ()),
            loaded=plgpu.Barrier(num_arrivals=1),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="fp8_quantize_blocks",
    )
    values, scales = kernel(w)
    return values, scales.swapaxes(1, 2) if transpose else scales


def _kernel(w, values, scales, *, x_smem, amax_smem, values_smem, loaded, power_of_two, transpose):
    matrix, row, column = (lax.axis_index(name) for name in ("matrix", "row", "column"))
    down, across = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
    plgpu.copy_gmem_to_smem(w.at[matrix, down, across], x_smem, loaded)
    plgpu.barrier_wait(loaded)
    _, row_blocks, column_blocks = scales.shape
    place = (matrix * row_blocks + row) * column_blocks + column
    largest = float(jnp.finfo(values.dtype).max)
    _quantise(x_smem, amax_smem, values_smem, scales, place, largest, power_of_two, transpose)
    plgpu.commit_smem()
    target = values.at[matrix, across, down] if transpose else values.at[matrix, down, across]
    plgpu.copy_smem_to_gmem(values_smem, target)
    plgpu.wait_smem_to_gmem(0)


def _quantise(x, amax, values, scales, place, largest, power_of_two, transpose):
    transforms = swizzled(values.dtype) if transpose else ()

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(transforms), plgpu.RefType(), _SCALAR)
    )
    def run(_, x, amax, values, scales, place):
        thread = arith.remui(mgpu.utils.thread_idx(), int32(WARP * WARPS))
        lane, warp = arith.remui(thread, int32(WARP)), arith.divui(thread, int32(WARP))
        held = _read(mgpu.utils.memref_ptr(x), lane, warp)
        top = functools.reduce(maximum, (magnitude(number) for row in held for number in row))
        top = _agree(top, mgpu.utils.memref_ptr(amax), thread)
        scale, inverse = scale_and_inverse(top, largest, power_of_two)
        scaled = [[arith.mulf(number, inverse) for number in row] for row in held]
        (_write_transposed if transpose else _write)(values, scaled, lane, warp)
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread, int32(0))):
            at = arith.muli(place.registers.item(), int32(4))
            llvm.store(scale, address(mgpu.utils.memref_ptr(scales), at), alignment=4)

    run(x, amax, values, scales, place)  # pyright: ignore[reportCallIssue]


def _read(base, lane, warp):
    """32 rows of four columns: two neighbours in each half of the block."""
    kind, held = ir.VectorType.get((2,), ir.F32Type.get()), []
    own = arith.addi(arith.muli(warp, int32(ROWS * TILE * 4)), arith.muli(lane, int32(8)))
    for i in range(ROWS):
        row = []
        for half in range(2):
            at = address(base, arith.addi(own, int32((i * TILE + half * HALF) * 4)))
            pair = llvm.load(kind, at, alignment=8)
            row += [vector.extract(pair, dynamic_position=[], static_position=[c]) for c in range(2)]
        held.append(row)
    return held


def _agree(top, base, thread):
    """The maximum over all threads."""
    kind = ir.VectorType.get((4,), ir.F32Type.get())
    llvm.store(top, address(base, arith.muli(thread, int32(4))), alignment=4)
    mgpu.utils.warpgroup_barrier()
    for i in range(WARP * WARPS // 4):
        four = llvm.load(kind, address(base, int32(16 * i)), alignment=16)
        for c in range(4):
            top = maximum(top, vector.extract(four, dynamic_position=[], static_position=[c]))
    return top


def _write_transposed(values, rows, lane, warp):
    base, name = mgpu.utils.memref_ptr(values), ptx_name(values)
    for c in range(4):
        column = arith.addi(arith.muli(lane, int32(2)), int32(c // 2 * HALF + c % 2))
        write_column(base, [row[c] for row in rows], name, column, warp)


def _write(values, rows, lane, warp):
    i16, name = ir.IntegerType.get_signless(16), ptx_name(values)
    own = arith.addi(arith.muli(warp, int32(ROWS * TILE)), arith.muli(lane, int32(2)))
    for i, row in enumerate(rows):
        for half in range(2):
            low, high = row[2 * half : 2 * half + 2]
            pair = llvm.inline_asm(
                i16, [low, high], f"cvt.rn.satfinite.{name}x2.f32 $0, $2, $1;", "=h,f,f", asm_dialect=0
            )
            at = arith.addi(own, int32(i * TILE + half * HALF))
            llvm.store(pair, address(mgpu.utils.memref_ptr(values), at), alignment=2)  # pyright: ignore[reportArgumentType]

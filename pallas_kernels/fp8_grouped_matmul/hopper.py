"""Device code of the FP8 products: one 128-deep step on the tensor cores, and its promotion into float32.

Hopper's tensor cores keep about 14 bits of an FP8 sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
So the product of every 128 of the contraction starts from nothing, and is scaled and added in float32
by the ordinary units while the other warpgroup has the tensor cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_kernels.grouped_matmul.hopper import ROW_BYTES, WARPGROUP_ROWS, swizzled

STEP = 128  # Contraction of one step: what one scale covers, and 128 bytes, the widest swizzle.
INSTRUCTION = 32  # Contraction of one WGMMA.

# The tensor cores' own layout, one 32-bit register an element: pairs in 64 bits make the compiler wait.
SUMS = plgpu.Layout._WGMMA_ACC_32BIT
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_SUMS = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
_PTX_NAMES = {jnp.dtype(jnp.float8_e4m3fn): "e4m3", jnp.dtype(jnp.float8_e5m2): "e5m2"}


def zeros(columns: int):
    """A warpgroup's float32 sums."""
    return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, columns), jnp.float32), SUMS)


def multiply(left, right, sums=None):
    """Starts `left @ right.T`: `[64, 128]` and `[columns, 128]`, swizzled FP8 -> `[64, columns]` float32.

    Nothing may touch the result before it has been through `settle`. With `sums`, which have been through it,
    the tensor cores add the product to them, in the 14 bits that they keep.
    """
    columns = right.shape[0]
    types = _PTX_NAMES[jnp.dtype(left.dtype)], _PTX_NAMES[jnp.dtype(right.dtype)]
    operands = (left, right) if sums is None else (left, right, sums)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(left.dtype)), plgpu.RefType(swizzled(right.dtype)), SUMS)[
            : len(operands)
        ],
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP_ROWS, columns), jnp.float32, layout=SUMS),
    )
    def run(_, left, right, *sums):
        left_at, left_stride = _descriptor(left, (WARPGROUP_ROWS, STEP), (WARPGROUP_ROWS, STEP), False)
        right = mgpu.utils.memref_transpose(right, (1, 0, 3, 2))
        right_at, right_stride = _descriptor(right, (STEP, STEP), (STEP, columns), True)
        nvvm.wgmma_fence_aligned()
        sums = [register for given in sums for register in given.registers.flat] or None
        for i in range(STEP // INSTRUCTION):
            sums = _wgmma(
                sums, _advance(left_at, i * left_stride), _advance(right_at, i * right_stride), columns, types
            )
        nvvm.wgmma_commit_group_sync_aligned()
        shape = _SUMS.registers_shape((WARPGROUP_ROWS, columns))
        registers = np.array(sums, dtype=object).reshape(shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=_SUMS, _is_signed=None)

    return run(*operands)  # pyright: ignore[reportCallIssue]


def settle(product, pending: int):
    """`product` once at most `pending` later ones are still under way."""

    @plgpu.inline_mgpu(
        arg_types=(SUMS,),
        return_type=plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=SUMS),
    )
    def run(_, product):
        nvvm.wgmma_wait_group_sync_aligned(pending)
        return fragmented_array.optimization_barrier(product)

    return run(product)  # pyright: ignore[reportCallIssue]


def accumulate(steps, start, finish, sums, overlap: int):
    """Runs all steps; while one is scaled and added, the tensor cores work on the next.

    Args:
      steps: how many, int32.
      start: `start(i) -> (product, rest)`, the product under way.
      finish: `finish(i, (product, rest), sums) -> sums`, the product settled.
      sums: what to add to.
      overlap: steps of one pass of the loop. The last of a pass has no next: a product under way across
        passes makes the compiler wait after every instruction.
    """

    def settled(started, pending):
        return settle(started[0], pending), started[1]

    def run(first, count, sums):
        under_way = start(first)
        for k in range(1, count):
            following = start(first + k)
            sums = finish(first + k - 1, settled(under_way, 1), sums)
            under_way = following
        return finish(first + count - 1, settled(under_way, 0), sums)

    def passes(count, low, high, sums):
        return lax.fori_loop(
            0, (high - low) // count, lambda i, sums: run(low + count * i, count, sums), sums
        )

    most = steps // overlap * overlap
    return passes(1, most, steps, passes(overlap, jnp.int32(0), most, sums))


def _descriptor(ref, large_tile, group_size, k_major):
    (at, strides), _, _ = mma_utils.create_descriptor(
        ref, swizzle=ROW_BYTES, large_tile=large_tile, group_size=group_size, logical_k_major=k_major
    )
    return at, strides[1][0]


def _advance(descriptor, offset: int):
    i64 = ir.IntegerType.get_signless(64)
    step = arith.constant(i64, ir.IntegerAttr.get(i64, mma_utils.encode_addr(offset)))
    return llvm.add(descriptor, step, overflow_flags=llvm.IntegerOverflowFlags.none)


def _wgmma(sums, left, right, columns: int, types):
    """One WGMMA. Without `sums` it starts from nothing, which saves clearing the registers."""
    count = columns // 2
    vector_type = ir.VectorType.get((1,), ir.F32Type.get())
    outputs, inputs = ["=f"] * count, [] if sums is None else [str(i) for i in range(count)]
    first = count + len(inputs)
    registers = ",".join(f"${i}" for i in range(count))
    ptx = (
        f"{{ .reg .pred p; setp.ne.b32 p, {int(sums is not None)}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{INSTRUCTION}.f32.{types[0]}.{types[1]} "
        f"{{{registers}}}, ${first}, ${first + 1}, p, 1, 1; }}\n"
    )
    result = llvm.inline_asm(
        llvm.StructType.get_literal([vector_type] * count),
        [*(sums or []), left, right],
        ptx,
        ",".join([*outputs, *inputs, "l", "l"]),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(vector_type, result, [i]) for i in range(count)]


def promote(sums, product, row_scales, column_scales=None):
    """`sums + product * scales`, each element one float32 multiply-add.

    Args:
      sums, product: `[64, columns]`.
      row_scales: one or more `[64]`; with several, each serves an equal share of the columns.
      column_scales: `[columns]`, or None.
    """
    if column_scales is None:
        return _promote_by_row(sums, product, row_scales)
    return _promote_by_both(sums, product, row_scales[0], column_scales)


def _promote_by_row(sums, product, row_scales):
    columns = sums.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(SUMS, SUMS, *[PER_ROW] * len(row_scales)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=SUMS),
    )
    def run(_, sums, product, *row_scales):
        scales = [[_scalar(r) for r in scale.registers.flat] for scale in row_scales]
        share = columns // len(row_scales)

        def element(index, total, value):
            return llvm.intr_fma(value, scales[8 * index[1] // share][index[4]], total)

        return _map(element, sums, product)

    return run(sums, product, *row_scales)  # pyright: ignore[reportCallIssue]


def _promote_by_both(sums, product, row_scale, column_scales):
    @plgpu.inline_mgpu(
        arg_types=(SUMS, SUMS, PER_ROW, PER_COLUMN),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=SUMS),
    )
    def run(_, sums, product, row_scale, column_scales):
        rows = [_scalar(r) for r in row_scale.registers.flat]
        columns = column_scales.registers.reshape(-1)

        def element(index, total, value):
            scale = vector.extract(columns[index[1]], dynamic_position=[], static_position=[index[8]])
            return llvm.intr_fma(arith.mulf(value, scale), rows[index[4]], total)

        return _map(element, sums, product)

    return run(sums, product, row_scale, column_scales)  # pyright: ignore[reportCallIssue]


def _scalar(register):
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, dynamic_position=[], static_position=[0])
    return register


def _map(element, sums, product):
    """`element(index, sum, product)` on every register.

    The index counts blocks of 8 columns at 1, of 8 rows at 4, and single columns at 8.
    """
    kind = ir.VectorType.get((1,), ir.F32Type.get())
    out = np.empty_like(sums.registers)
    for index, total in np.ndenumerate(sums.registers):
        value = element(index, _scalar(total), _scalar(product.registers[index]))
        out[index] = vector.broadcast(kind, value)
    return mgpu.FragmentedArray(_registers=out, _layout=_SUMS, _is_signed=None)


def store(value, out, out_smem, row, column, *, wanted=True, add=False):
    """Stores a warpgroup's product at `row` and `column` of `out`, or adds it to what is there, if `wanted`.

    The copy engine leaves out what lies past the last row and column. It counts in blocks: `column` must be a
    multiple of the width of `out_smem`, or the end of each block is lost.
    """
    buffers, _, width = out_smem.shape
    for i in range(value.shape[1] // width):
        block = out_smem.at[i % buffers]
        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        block[...] = value[:, i * width : (i + 1) * width].astype(out.dtype)
        plgpu.commit_smem()
        at = column + i * width
        target = out.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(at, width)]
        # A whole block past the last row or column must not reach the next group.
        inside = (at < out.shape[1]) & (row < out.shape[0]) & wanted
        plgpu.copy_smem_to_gmem(block, target, predicate=inside, reduction_op="add" if add else None)


def added(kernel, into, *operands):
    """`into` after `kernel(*operands, its memory)`, which adds to it. It is copied if it is needed again.

    Each element is added to once: the same operands give the same bits.
    """
    memory = jax.new_ref(into)
    kernel(*operands, memory)
    return jax.freeze(memory)

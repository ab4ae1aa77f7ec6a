"""What the Mosaic GPU attention kernels share: roles, layouts in registers and memory, barriers, masks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

SHARED_MEMORY = 232_448  # bytes a Hopper block may use
LOG2E = math.log2(math.e)

WARPGROUPS = 2  # that compute
ROWS = 64  # of a product, and so of a compute warpgroup
TILE = WARPGROUPS * ROWS

MATRIX = plgpu.Layout.WGMMA  # [64, n] in the registers of a warpgroup, as WGMMA accumulates it
PER_ROW = MATRIX.reduce(1)
PER_COLUMN = MATRIX.reduce(0)


def launch(kernel, name, programs, out_type, scratch):
    """A kernel of two compute warpgroups and one that loads, on a grid of that many programs."""
    call = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name=name,
    )

    def run(*operands):
        # Pallas forgets which manual mesh axes (of `shard_map`) its results vary over.
        axes = tuple(_varying(operands[0]))
        return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying") if axes else x, call(*operands))

    return run


def _varying(array):
    return jax.typeof(array).manual_axis_type.varying


def roles(compute, load):
    """Runs `compute(warpgroup)` in those that compute; `load()` in the third, which needs few registers."""
    wg = lax.axis_index("wg")

    @pl.when(wg < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        compute(wg)

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        load()


def loader_threads(like) -> int:
    """Threads that load: one warp, or where Pallas takes no single warp, under manual mesh axes, all four."""
    return 128 if _varying(like) else 32


def load_with(threads, body):
    """Runs the loading `body` in that many threads of the calling warpgroup."""
    if threads == 128:
        body()
        return

    @plgpu.warp_map
    def _(warp):
        pl.when(warp == 0)(body)


def tiled(*shape, dtype: jax.typing.DTypeLike = jnp.bfloat16):
    """Shared memory of 16-bit numbers in the layout that TMA writes and WGMMA reads."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def across(array, columns):
    """`[rows]` to `[rows, columns]`."""
    return lax.broadcast_in_dim(array, (array.shape[0], columns), [0])


def down(array, rows):
    """`[columns]` to `[rows, columns]`."""
    return lax.broadcast_in_dim(array, (rows, array.shape[0]), [1])


def per_row(ref):
    """Reads one number a row from global memory."""
    return plgpu.load(ref, layout=PER_ROW, optimized=False)


def per_column(ref):
    """Reads one number a column from global memory."""
    return plgpu.load(ref, layout=PER_COLUMN, optimized=False)


def row_numbers():
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)


def _hardware_barrier(operation, barriers, index, threads):
    if isinstance(index, int):

        @plgpu.inline_mgpu()
        def fixed(_):
            mgpu.utils.inline_ptx(f"bar.{operation} {barriers[index]}, {threads};")

        return fixed()

    # Numbers that are constants, under predicates: the compiler sinks an arrival on a computed number below
    # the arithmetic that follows, and the one who waits for it waits longer.
    steps = "".join(
        f"setp.eq.s32 p, $0, {i}; @p bar.{operation} {barrier}, {threads}; "
        for i, barrier in enumerate(barriers)
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def chosen(_, index):
        mgpu.utils.inline_ptx("{ .reg .pred p; " + steps + "}", index.registers[()])

    return chosen(index)


def arrive(barriers, index, threads):
    """Counts the calling threads on hardware barrier `barriers[index]` and goes on; `threads` complete it.

    Cheaper than a barrier in shared memory, on which each of the 128 threads of a warpgroup arrives.
    """
    _hardware_barrier("arrive", barriers, index, threads)


def sync(barriers, index, threads):
    """Waits on hardware barrier `barriers[index]` until `threads` threads, the caller's too, came to it."""
    _hardware_barrier("sync", barriers, index, threads)


def runtime_zero():
    """0, as a number that the compiler does not know.

    Added to an index in every round of a loop, it keeps what depends on the index from being computed ahead
    of the loop: operand descriptors, two registers for each 16 columns, are better recomputed than spilled.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())))
    def second_grid_index(_):
        i32 = ir.IntegerType.get_signless(32)
        zero = llvm.inline_asm(i32, [], "mov.u32 $0, %ctaid.y;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(zero, (), mgpu.WGSplatFragLayout(()), is_signed=True)

    return second_grid_index()


def uniform(number):
    """An int32 that is the same in all threads, as a number of which the compiler knows it.

    What was read from memory it takes for different: loop counters and operand descriptors that depend on it
    then pass through the threads' registers, in the way of every product.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(())),
    )
    def broadcast(_, number):
        i32 = ir.IntegerType.get_signless(32)
        first = mgpu.utils.inline_ptx(
            "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;",
            number.registers[()],
            result_types=i32,
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(first, (), mgpu.WGSplatFragLayout(()), is_signed=True)

    return broadcast(number)


def keep_columns(matrix, limit, *, up_to):
    """-inf where the column number is above (`up_to`) or below (not `up_to`) its row's `limit`.

    Written on registers: compared with a matrix of column numbers, which the compiler computes once and keeps
    (32 registers a thread, spilled), this is one comparison with a constant an element.
    """

    @plgpu.inline_mgpu(
        arg_types=(MATRIX, PER_ROW), return_type=plgpu.ShapeDtypeStruct(matrix.shape, matrix.dtype, MATRIX)
    )
    def keep(_, matrix, limit):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        # Thread t of a warp holds columns 2 (t % 4) and 2 (t % 4) + 1 of every 8, in two rows of each 16.
        lane_column = arith.muli(arith.remui(mgpu.utils.thread_idx(), constant(4)), constant(2))
        minus_infinity = arith.constant(f32, ir.FloatAttr.get(f32, -math.inf))
        order = arith.CmpIPredicate.sge if up_to else arith.CmpIPredicate.sle
        limits = []
        for register in limit.registers.reshape(2):
            if isinstance(register.type, ir.VectorType):
                register = vector.extract(register, dynamic_position=[], static_position=[0])
            limits.append(arith.subi(register, lane_column))
        kept = np.empty_like(matrix.registers)
        for index, pair in np.ndenumerate(matrix.registers):
            block, half = index[1], index[4]
            for element in range(2):
                value = vector.extract(pair, dynamic_position=[], static_position=[element])
                visible = arith.cmpi(order, limits[half], constant(8 * block + element))
                value = arith.select(visible, value, minus_infinity)
                pair = vector.insert(value, pair, dynamic_position=[], static_position=[element])
            kept[index] = pair
        return mgpu.FragmentedArray(_registers=kept, _layout=matrix.layout, _is_signed=None)

    return keep(matrix, limit)


def hide_keys(s, call, first_row, first_key, row_segments, key_segments):
    """-inf where a query (row of s) does not see a key (column).

    Args:
      s: float32 `[64, columns]`.
      call: has `kv_len`, `causal` and `offset`, which is kv_len - q_len.
      first_row, first_key: the numbers of the first query and key.
      row_segments: ids of the queries, or None.
      key_segments: reads the ids of the keys, when there are any.
    """
    limit = plgpu.layout_cast(jnp.full((ROWS,), call.kv_len - 1 - first_key, jnp.int32), PER_ROW)
    if call.causal:
        limit = jnp.minimum(limit, row_numbers() + (first_row + call.offset - first_key))
    s = keep_columns(s, limit, up_to=True)
    if row_segments is not None:
        same = across(row_segments, s.shape[1]) == down(key_segments(), ROWS)
        s = jnp.where(same, s, -jnp.inf)
    return s

"""Decoding attention for Hopper in Pallas Mosaic GPU: the kernel that reads the cache.

The queries of a sequence, all heads, are rows of one tile of 64 (FlashMLA's arrangement). Two compute
warpgroups take 64 entries of the cache each, S = Q K^T, and agree on the rows' maximum; the weights P go to
shared memory, where the RoPE keys lay, and each warpgroup adds P V to its half of the output's columns. A
third warpgroup loads by TMA. The cache is read from device memory once: the entries that are keys for S are
the values for P V where they lie.

The work is split along the cache: every group of programs takes pieces of sequences (`mosaic_gpu_pieces`),
and writes one partial result for each.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mla_attention import mosaic_gpu_common as common
from pallas_kernels.mla_attention.mosaic_gpu_common import ROWS, WARPGROUPS, across, arrive, sync, tiled
from pallas_kernels.mla_decode import mosaic_gpu_pieces as pieces
from pallas_kernels.mla_decode.mosaic_gpu_pieces import BLOCK

HALF = BLOCK // WARPGROUPS  # entries of the cache that a warpgroup scores at a time
_COMPUTE = WARPGROUPS * 128  # threads

# Hardware barriers; the compiler uses the lower ones.
_PAIR, _Q_FREE, _FREE = range(4, 5), range(5, 6), range(6, 8)


class Call(typing.NamedTuple):
    """What is static in one call."""

    batch: int
    s_q: int
    heads: int
    rank: int
    rope: int
    slots: int  # entries of a page, or the capacity
    capacity: int  # the most entries of a sequence
    paged: bool
    scale: float  # positive
    groups: int  # of programs; each has one for every tile of rows
    splits: int  # pieces of a sequence, cut in strides; 0 for equal shares (`mosaic_gpu_pieces`)
    loaders: int  # threads that load
    tile_rows: int  # queries times heads that a program takes

    @property
    def rows(self) -> int:
        return self.s_q * self.heads

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile_rows)

    @property
    def part_rows(self) -> int:
        """Rows of a partial result: whole warps' 16."""
        return -(-self.rows // 16) * 16

    @property
    def parts(self) -> int:
        return self.batch * self.splits or self.batch + self.groups - 1

    @property
    def stride(self) -> int:
        """From one block of a piece to the next."""
        return self.splits or 1

    @property
    def with_loader(self) -> int:
        """Threads of a barrier on which the compute warpgroups announce a free slot to the loader."""
        return _COMPUTE + self.loaders

    def copies(self, entries: int) -> int:
        """TMA copies that fetch so many entries: one, or one a page where pages are smaller."""
        return max(1, entries // self.slots) if self.paged else 1


class _Operands(typing.NamedTuple):
    q: typing.Any
    c_kv: typing.Any
    k_rope: typing.Any
    lengths: typing.Any
    table: typing.Any


class _Shared(typing.NamedTuple):
    """Shared memory of a program, and the barriers that its loads complete."""

    q: typing.Any
    c_kv: typing.Any
    rope: typing.Any  # then the weights
    peaks: typing.Any
    totals: typing.Any
    lse: typing.Any
    q_full: typing.Any
    full: typing.Any


def split(q, c_kv, k_rope, lengths, table, *, call):
    """Partial results of all groups.

    Args:
      q: bf16 `[batch, rows, rank + rope]`, rows a multiple of 8.
      c_kv: bf16 `[batch or pages, slots, rank]`.
      k_rope: bf16 `[batch or pages, slots, rope]`.
      lengths: int32 `[batch]`.
      table: int32 `[batch, max_pages]`, or None for a contiguous cache.
      call: what is static.

    Returns:
      float32 outputs `[parts, part_rows, rank]`, log-sum-exps in base 2 `[parts, tiles * 64]`, and the parts
      of each sequence, int32 `[batch, 2]`, as `pieces.of_group` says.
    """

    def kernel(*refs):
        operands, outs, bounds, shared = _Operands(*refs[:5]), refs[5:7], refs[7], _Shared(*refs[8:])
        program = lax.axis_index("program")
        group, tile = lax.div(program, call.tiles), lax.rem(program, call.tiles)
        for_every_piece = pieces.of_group(call, operands.lengths, group)

        def compute(wg):
            for slot in range(WARPGROUPS):
                arrive(_FREE, slot, call.with_loader)
            arrive(_Q_FREE, 0, call.with_loader)

            def work(*piece):
                _Compute(call, shared, wg, tile, *piece).run(outs)

            for_every_piece(bounds, work)
            plgpu.wait_smem_to_gmem(0)

        def load():
            for_every_piece(None, functools.partial(_load, call, operands, shared, tile))

        common.roles(compute, lambda: common.load_with(call.loaders, load))

    scratch = _Shared(
        q=tiled(ROWS, call.rank + call.rope),
        c_kv=tiled(WARPGROUPS, HALF, call.rank),
        rope=tiled(WARPGROUPS, HALF, call.rope),
        peaks=plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        totals=plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        lse=plgpu.SMEM((ROWS,), jnp.float32),
        q_full=plgpu.Barrier(),
        full=plgpu.Barrier(num_arrivals=2 * call.copies(HALF), num_barriers=WARPGROUPS),
    )
    out_type = [
        jax.ShapeDtypeStruct((call.parts, call.part_rows, call.rank), jnp.float32),
        jax.ShapeDtypeStruct((call.parts, call.tiles * ROWS), jnp.float32),
        jax.ShapeDtypeStruct((call.batch, 2), jnp.int32),
    ]
    run = common.launch(kernel, "mla_decode_split", call.groups * call.tiles, out_type, list(scratch))
    return run(q, c_kv, k_rope, lengths, table)


def _load(call, operands, shared, tile, b, part, length, first, count):
    """Loads what a piece needs: queries after the first block, as the piece before may still use its own."""
    del part

    def load_queries():
        sync(_Q_FREE, 0, call.with_loader)
        plgpu.copy_gmem_to_smem(operands.q.at[b, pl.ds(tile * ROWS, ROWS)], shared.q, shared.q_full)

    copies = call.copies(HALF)
    size = HALF // copies

    @pl.loop(0, count)
    def _(number):
        block = first + number * call.stride
        for slot in range(WARPGROUPS):
            sync(_FREE, slot, call.with_loader)
            full = shared.full.at[slot]
            for copy in range(copies):
                position = block * BLOCK + slot * HALF + copy * size
                if call.paged:
                    # Beyond the last page of the sequence its last page is read again, and masked.
                    page = jnp.minimum(lax.div(position, call.slots), lax.div(length - 1, call.slots))
                    row, start = operands.table[b, page], lax.rem(position, call.slots)
                else:
                    row, start = b, position
                source, target = pl.ds(start, size), pl.ds(copy * size, size)
                plgpu.copy_gmem_to_smem(operands.c_kv.at[row, source], shared.c_kv.at[slot, target], full)
                plgpu.copy_gmem_to_smem(operands.k_rope.at[row, source], shared.rope.at[slot, target], full)
        pl.when(number == 0)(load_queries)


class _Compute:
    """A compute warpgroup's share of a piece: every second 64 entries, and half of the output's columns."""

    def __init__(self, call, shared, wg, tile, b, part, length, first, count):
        del b
        self.call, self.shared, self.wg, self.tile = call, shared, wg, tile
        self.part, self.length, self.first, self.count = part, length, first, count
        self.columns = pl.ds(wg * (call.rank // WARPGROUPS), call.rank // WARPGROUPS)

    def run(self, outs):
        width = self.call.rank // WARPGROUPS
        self.store(outs, *pl.run_scoped(self.accumulate, plgpu.ACC((ROWS, width))))

    def accumulate(self, out):
        """The sum of weighted values, the maximum of the logits in base 2, and this warpgroup's total."""
        call = self.call
        plgpu.barrier_wait(self.shared.q_full)
        carry = (
            plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), common.PER_ROW),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), common.PER_ROW),
        )
        # Blocks that every query sees whole.
        whole = pieces.seen_whole(call, self.length, self.first, self.count)
        for begin, end, masked in ((0, whole, False), (whole, self.count, True)):
            step = functools.partial(self.step, out=out, masked=masked)
            carry = lax.fori_loop(begin, end, step, carry)
        arrive(_Q_FREE, 0, call.with_loader)
        return plgpu.wgmma_accumulator_load(out, wait_n=0), *carry

    def step(self, i, carry, *, out, masked):
        """Adds a block to the accumulators, when its first half is out of the shared memory."""
        call, shared = self.call, self.shared
        block = self.first + i * call.stride
        peak, total = carry
        s = pl.run_scoped(self.scores, plgpu.ACC((ROWS, HALF), jnp.float32))
        if masked:
            s = common.keep_columns(s, self.last_seen(block), up_to=True)
        exponent_scale = call.scale * common.LOG2E
        mine = s.max(axis=1) * exponent_scale
        shared.peaks[self.wg] = mine
        sync(_PAIR, 0, _COMPUTE)
        theirs = plgpu.load(shared.peaks.at[1 - self.wg], layout=common.PER_ROW, optimized=False)
        new_peak = jnp.maximum(peak, jnp.maximum(mine, theirs))
        # A row that has seen nothing keeps -inf: subtract 0 there, so that no NaN arises.
        below = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
        weights = jnp.exp2(s * exponent_scale - across(below, HALF))
        factor = jnp.exp2(peak - below)
        total = total * factor + weights.sum(axis=1)
        shared.rope[self.wg] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        out[...] = plgpu.wgmma_accumulator_load(out, wait_n=None) * across(factor, out.shape[1])
        sync(_PAIR, 0, _COMPUTE)
        for slot in range(WARPGROUPS):
            plgpu.wgmma(out, shared.rope.at[slot], shared.c_kv.at[slot, :, self.columns])
        for slot in range(WARPGROUPS):
            plgpu.wgmma_wait(WARPGROUPS - 1 - slot)
            arrive(_FREE, slot, call.with_loader)
        return new_peak, total

    def scores(self, acc):
        """This warpgroup's 64 entries."""
        call, shared = self.call, self.shared
        plgpu.barrier_wait(shared.full.at[self.wg])
        latent, rope = pl.ds(0, call.rank), pl.ds(call.rank, call.rope)
        plgpu.wgmma(acc, shared.q.at[:, latent], shared.c_kv.at[self.wg].transpose((1, 0)))
        plgpu.wgmma(acc, shared.q.at[:, rope], shared.rope.at[self.wg].transpose((1, 0)))
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    def last_seen(self, block):
        """For each row the last entry it sees, counted from the first that this warpgroup holds."""
        call = self.call
        last = self.length - call.s_q - block * BLOCK - self.wg * HALF
        limit = plgpu.layout_cast(jnp.full((ROWS,), last, jnp.int32), common.PER_ROW)
        if call.s_q > 1:
            limit += (common.row_numbers() + self.tile * ROWS) // call.heads
        return limit

    def store(self, outs, values, peak, total):
        """Writes this warpgroup's columns of the partial output; one of the two writes the log-sum-exp."""
        out, lse = outs
        shared = self.shared
        shared.totals[self.wg] = total
        sync(_PAIR, 0, _COMPUTE)
        total += plgpu.load(shared.totals.at[1 - self.wg], layout=common.PER_ROW, optimized=False)
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        values *= across(jnp.where(seen, 1 / safe, 0.0), values.shape[1])
        _store_rows(out.at[self.part], values, self.tile * ROWS, self.columns.start)

        @pl.when(self.wg == 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared.lse[...] = jnp.where(seen, peak + jnp.log2(safe), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.lse, lse.at[self.part, pl.ds(self.tile * ROWS, ROWS)])


def _store_rows(ref, values, first_row, first_column):
    """Writes a `[64, columns]` piece of a matrix in global memory, of its rows only those that exist."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), common.MATRIX, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
    )
    def store(_, ref, values, first_row, first_column):
        rows, columns = ir.MemRefType(ref.type).shape
        i32 = ir.IntegerType.get_signless(32)

        def constant(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        # Thread t of a warp holds columns 2 (t % 4) and 2 (t % 4) + 1 of every 8, in two rows of each 16.
        thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
        lane, warp = arith.remui(thread, constant(32)), arith.divui(thread, constant(32))
        warp_row = arith.addi(first_row.registers[()], arith.muli(warp, constant(16)))
        row = arith.addi(warp_row, arith.divui(lane, constant(4)))
        column = arith.addi(
            first_column.registers[()], arith.muli(arith.remui(lane, constant(4)), constant(2))
        )
        start = arith.addi(arith.muli(row, constant(columns)), column)
        base = mgpu.utils.memref_ptr(ref)
        exists = arith.cmpi(arith.CmpIPredicate.slt, warp_row, constant(rows))
        with mgpu.utils.when(exists):
            for index, register in np.ndenumerate(values.registers):
                block, half = index[1], index[4]
                offset = arith.addi(start, constant(8 * half * columns + 8 * block))
                llvm.store(register, mgpu.utils.getelementptr(base, [offset], ir.F32Type.get()))

    store(ref, values, first_row, first_column)

"""Decoding attention for Hopper: which blocks of which sequences a group of programs reads.

All sequences' blocks lie along a line, one sequence after another, each followed by what it costs beside its
blocks. Group g takes the line from g shares to g + 1; every program finds its part of it from the lengths.
"""

import typing

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

BLOCK = 128  # entries of the cache
# What a sequence costs a group beside its blocks, in blocks: queries in, partial result out. An estimate.
SEQUENCE_COST = 1
_LANES = 32
_TOGETHER = 8  # chunks of `_LANES` lengths whose loads are in flight at a time


class Share(typing.NamedTuple):
    """From block `low` of sequence `first` to block `high`, exclusive, of sequence `last`.

    `last` may be the number of sequences; then `high` is 0.
    """

    first: typing.Any
    low: typing.Any
    last: typing.Any
    high: typing.Any


def share_of(lengths, group, *, groups, capacity) -> Share:
    """The share of a group. To be called by whole warps, all of whose threads get the same.

    Args:
      lengths: reference to int32 `[batch]` in global memory; they count as 0 to `capacity`.
      group: which of the `groups`.
    """
    number = plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=(number,) * 4)
    def find(_, lengths, group):
        found = _find(lengths, group.registers[()], groups, capacity)
        layout = mgpu.WGSplatFragLayout(())
        return tuple(mgpu.FragmentedArray.splat(x, (), layout, is_signed=True) for x in found)

    return Share(*find(lengths, group))


def for_every_piece(share, lengths, bounds, group, capacity, work):
    """Runs `work(b, length, low, high)` on the blocks of each sequence that a group reads.

    Where `bounds` is given, int32 `[batch, 2]`, the groups that read a sequence's first and last block say
    there which parts it has: from the first to the second, exclusive. Group g's part of sequence b is b + g.
    """
    (batch,) = lengths.shape

    @pl.loop(share.first, jnp.minimum(share.last, batch - 1) + 1)
    def _(b):
        length = jnp.clip(lengths[b], 0, capacity)
        blocks = lax.div(length + BLOCK - 1, BLOCK)
        low = jnp.where(b == share.first, share.low, 0)
        high = jnp.where(b == share.last, share.high, blocks)
        if bounds is not None:

            @pl.when((low == 0) & ((high > 0) | (blocks == 0)))
            def _():
                bounds[b, 0] = jnp.where(blocks > 0, b + group, 0)

            @pl.when(high == blocks)
            def _():
                bounds[b, 1] = jnp.where(blocks > 0, b + group + 1, 0)

        pl.when(low < high)(lambda: work(b, length, low, high))


def _i32(value):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def _ptx(text, *operands):
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx(text, *operands, result_types=i32, has_side_effects=True)


def _over_lanes(operation, value):
    """The sum ("add") or maximum ("max") over a warp."""
    return _ptx(f"redux.sync.{operation}.s32 $0, $1, 0xffffffff;", value)


def _sums_up_to(value):
    """The sum over the lanes of a warp up to each."""
    for distance in (1, 2, 4, 8, 16):
        value = _ptx(
            "{ .reg .pred p; .reg .b32 t; "
            f"shfl.sync.up.b32 t|p, $1, {distance}, 0, 0xffffffff; @!p mov.b32 t, 0; add.s32 $0, t, $1; }}",
            value,
        )
    return value


def _find(lengths, group, groups, capacity):
    """The fields of a `Share`, as the compiler's values."""
    (batch,) = ir.MemRefType(lengths.type).shape
    i32, base = ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(lengths)
    lane = arith.remui(mgpu.utils.thread_idx(), _i32(_LANES))
    together = min(_TOGETHER, -(-batch // _LANES))

    def costs(start):
        """Of the sequences from a number on, one a lane, and whether there is one; in turn for each chunk."""
        found = []
        for chunk in range(together):
            b = arith.addi(start, arith.addi(lane, _i32(_LANES * chunk)))
            place = arith.minsi(b, _i32(batch - 1))
            length = llvm.load(i32, mgpu.utils.getelementptr(base, [place], i32))
            exists = arith.cmpi(arith.CmpIPredicate.slt, b, _i32(batch))
            found.append((length, exists))
        for length, exists in found:
            length = arith.minsi(arith.maxsi(length, _i32(0)), _i32(capacity))
            blocks = arith.divui(arith.addi(length, _i32(BLOCK - 1)), _i32(BLOCK))
            cost = arith.addi(blocks, _i32(SEQUENCE_COST))
            counts = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.sgt, blocks, _i32(0)))
            yield arith.select(counts, cost, _i32(0)), exists

    def loop(start, body):
        """`body(chunks' costs, carry)` over all sequences."""
        if batch <= together * _LANES:
            return body(costs(_i32(0)), start)
        op = scf.ForOp(_i32(0), _i32(batch), _i32(together * _LANES), start)
        with ir.InsertionPoint(op.body):
            scf.YieldOp(body(costs(op.induction_variable), list(op.inner_iter_args)))
        return list(op.results)

    def add(chunks, carry):
        (total,) = carry
        for cost, _ in chunks:
            total = arith.addi(total, cost)
        return [total]

    (total,) = loop([_i32(0)], add)
    total = _over_lanes("add", total)
    share = arith.divui(arith.addi(total, _i32(groups - 1)), _i32(groups))
    share = arith.maxsi(share, _i32(1))
    edge = arith.muli(group, share)
    edges = edge, arith.addi(edge, share)

    def locate(chunks, carry):
        before, *found = carry
        for cost, exists in chunks:
            # A sequence's end on the line. Up to an edge, or so little behind it that no block is left, it is
            # over there.
            end = arith.addi(before, _sums_up_to(cost))
            for i, edge in enumerate(edges):
                limit = arith.addi(edge, _i32(SEQUENCE_COST))
                over = arith.andi(exists, arith.cmpi(arith.CmpIPredicate.sle, end, limit))
                found[2 * i] = arith.addi(found[2 * i], arith.extui(i32, over))
                found[2 * i + 1] = arith.maxsi(found[2 * i + 1], arith.select(over, end, _i32(0)))
            before = _over_lanes("max", end)
        return [before, *found]

    _, *found = loop([_i32(0)] * 5, locate)
    results = []
    for i, edge in enumerate(edges):
        sequence, start = _over_lanes("add", found[2 * i]), _over_lanes("max", found[2 * i + 1])
        inside = arith.cmpi(arith.CmpIPredicate.slt, sequence, _i32(batch))
        block = arith.maxsi(arith.subi(edge, start), _i32(0))
        results += [sequence, arith.select(inside, block, _i32(0))]
    # The first group visits what comes before the first block, too.
    leading = arith.cmpi(arith.CmpIPredicate.eq, group, _i32(0))
    results[0] = arith.select(leading, _i32(0), results[0])
    return results

"""Decoding attention for Hopper: which blocks of which sequences a group of programs reads, in either way.

In equal shares (`mosaic_gpu_shares`) all groups are done together whatever the lengths are, and where a
sequence is cut depends on them all. In strides a sequence is always cut alike: piece p of `splits` has its
blocks p, p + splits, ... Then what a query finds depends on nothing but its own cache, to the bit; a group
that gets pieces of longer sequences is done later.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.mla_decode import mosaic_gpu_shares as shares
from pallas_kernels.mla_decode.mosaic_gpu_shares import BLOCK

# At most so many pieces for each group.
ROUNDS = 4
# What a piece costs a group beside its blocks, in parts of what a sequence of equal length costs in all.
_PIECE_COST = 1 / 256


def splits(batch: int, groups: int) -> int:
    """Into how many pieces a sequence is cut: the number that suits the groups best, lengths being equal.

    Not by the capacity: the same sequence may lie in a cache of another.
    """
    most = -(-groups * (ROUNDS if batch > 1 else 1) // batch)  # Of one sequence all are equally long.

    def cost(n):
        return math.ceil(batch * n / groups) * (1 / n + _PIECE_COST)

    return min(range(1, most + 1), key=cost)


def of_group(call, lengths, group):
    """`run(bounds, work)`, which runs `work(b, part, length, first, count)` on each piece of a group.

    To be called by whole warps. The piece is `count` blocks of sequence b, from `first` on in steps of
    `call.stride`, the part its place among the partial results. Where `bounds` is given, int32 `[batch, 2]`,
    somebody says there which parts a sequence has: from the first to the second, exclusive.
    """
    if not call.splits:
        share = shares.share_of(lengths, group, groups=call.groups, capacity=call.capacity)
        return functools.partial(_of_share, call, lengths, group, share)
    return functools.partial(_in_strides, call, lengths, group)


def _of_share(call, lengths, group, share, bounds, work):
    def blocks(b, length, low, high):
        work(b, b + group, length, low, high - low)

    shares.for_every_piece(share, lengths, bounds, group, call.capacity, blocks)


def _in_strides(call, lengths, group, bounds, work):
    @pl.loop(group, call.batch * call.splits, step=call.groups)
    def _(item):
        b, first = lax.rem(item, call.batch), lax.div(item, call.batch)
        length = jnp.clip(lengths[b], 0, call.capacity)
        blocks = lax.div(length + BLOCK - 1, BLOCK)
        count = lax.div(blocks - first + call.splits - 1, call.splits)
        if bounds is not None:

            @pl.when(first == 0)
            def _():
                bounds[b, 0] = b * call.splits
                bounds[b, 1] = b * call.splits + jnp.minimum(blocks, call.splits)

        pl.when(blocks > first)(lambda: work(b, b * call.splits + first, length, first, count))


def seen_whole(call, length, first, count):
    """How many blocks of a piece, from its first on, every query sees whole."""
    blocks = lax.div(jnp.maximum(length - call.s_q + 1, 0), BLOCK)
    return lax.clamp(0, lax.div(blocks - first + call.stride - 1, call.stride), count)

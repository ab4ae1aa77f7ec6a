"""What the Mosaic GPU attention kernels know of a call: its static numbers, and which blocks are visible."""

import functools
import heapq
import typing

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mla_attention.mosaic_gpu_common import TILE, WARPGROUPS

L2_BYTES = 24 * 2**20  # of keys and values, or queries and gradients, that the kernels walk over together
BLOCK = 64  # rows of a block that passes, in the backward kernels
# The backward kernels' weights are probabilities in this unit: then float16, which holds them while dP is
# computed, rounds none above 2^-29 coarser than to 11 bits.
UNIT = 2.0**-15


class Call(typing.NamedTuple):
    """What is static in one call."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int  # queries and keys that exist; the operands may be padded
    kv_len: int
    causal: bool
    scale: float  # positive
    d_k: int  # width of the keys that each head has to itself
    d_qk: int
    d_v: int
    loaders: int  # threads that load

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def d_rope(self) -> int:
        """Width of the key that the heads share."""
        return self.d_qk - self.d_k

    @property
    def offset(self) -> int:
        """Query i sees keys up to i + offset."""
        return self.kv_len - self.q_len

    @property
    def q_tiles(self) -> int:
        return -(-self.q_len // TILE)

    @property
    def kv_tiles(self) -> int:
        return -(-self.kv_len // TILE)

    @property
    def with_loader(self) -> int:
        """Threads of a barrier on which the compute warpgroups announce a free slot to the loader."""
        return WARPGROUPS * 128 + self.loaders

    def locate(self, index, heads, tiles, length, ascending):
        """Batch row, head and tile of a work item.

        All tiles come in order for some heads before the next heads, so many that their rows of that length,
        d_qk and d_v wide, stay in the L2 cache.
        """
        pairs = self.batch * heads
        most = max(1, min(pairs, L2_BYTES // (2 * length * (self.d_qk + self.d_v))))
        together = next(n for n in range(most, 0, -1) if pairs % n == 0)
        group, within = _divide(index, together * tiles)
        rank, member = _divide(within, together)
        return *_divide(group * together + member, heads), rank if ascending else tiles - 1 - rank

    def blocks_up_to(self, q_tile, size):
        """Key blocks that a query tile of a causal call visits; of numpy numbers."""
        seen = (q_tile + 1) * TILE + self.offset  # Keys that the tile's last query sees.
        return np.clip(-(-seen // size), 1, -(-self.kv_len // size))

    def key_blocks(self, ranges, row, q_tile, size):
        """Key blocks that a query tile sees: (first, first of the wholly visible, end of those, end)."""
        if ranges is not None:
            return tuple(ranges[row, q_tile, i] for i in range(4))
        count, whole = -(-self.kv_len // size), self.kv_len // size
        if not self.causal:
            return jnp.int32(0), 0, whole, jnp.int32(count)
        seen = q_tile * TILE + self.offset + 1  # Keys that the tile's first query sees.
        last = lax.clamp(1, lax.div(seen + TILE + size - 2, size), count)
        return jnp.int32(0), 0, lax.clamp(0, lax.div(seen, size), min(whole, count)), last

    def query_blocks(self, ranges, row, kv_tile):
        """Query blocks that see keys of a tile: (first, first of those that see all, end of those, end)."""
        if ranges is not None:
            return tuple(ranges[row, kv_tile, i] * (TILE // BLOCK) for i in range(4))
        count = self.q_tiles * (TILE // BLOCK)
        full = lax.convert_element_type((kv_tile + 1) * TILE <= self.kv_len, jnp.int32)  # All its keys exist.
        if not self.causal:
            return jnp.int32(0), 0, full * count, jnp.int32(count)
        first_key = kv_tile * TILE - self.offset  # The first query that sees the tile's first key.
        first = lax.clamp(0, lax.div(first_key, TILE), self.q_tiles - 1) * (TILE // BLOCK)
        # Queries that see nothing visit the first keys all the same: dS there must be written, as zeros.
        first *= lax.min(kv_tile, 1)
        whole = lax.clamp(first, lax.div(first_key + TILE - 1 + BLOCK - 1, BLOCK), count)
        return first, whole, whole + full * (count - whole), jnp.int32(count)


# What a tile costs beside its blocks of keys, in blocks: an estimate, which only the balance depends on.
_TILE_COST = 0.8
# With this many tiles for each program, dealing them out in turn leaves little to gain.
_MANY = 1000
# Tiles that see at least this share of the blocks of a causal call are dealt out as that call's.
_NEARLY_CAUSAL = 0.9


@functools.lru_cache(64)
def deal(call: Call, programs: int, kv_block: int, even: bool) -> np.ndarray:
    """Deals the query tiles out to the programs, each next one to whoever will be free first.

    Dealt in turn instead, the tiles of a causal call would leave the last program 3% behind the mean, and 27%
    at some lengths.

    Args:
      call: what is static.
      programs: how many run at once.
      kv_block: keys of a block.
      even: whether to take all tiles for equally long, as when segments decide.

    Returns:
      int32 `[programs, 3 + most tiles of one]`: how many tiles a program has, their indices for `locate`,
      zeros.
    """
    tiles = call.batch * call.heads * call.q_tiles
    if tiles > _MANY * programs:
        hands = [list(range(program, tiles, programs)) for program in range(programs)]
    else:
        order = np.arange(tiles, dtype=np.int32)
        _, _, q_tile = call.locate(order, call.heads, call.q_tiles, call.kv_len, not call.causal)
        cost = np.full(tiles, _TILE_COST)
        if call.causal and not even:
            cost += call.blocks_up_to(np.arange(call.q_tiles), kv_block)[q_tile]
        free = [(0.0, program) for program in range(programs)]
        hands = [[] for _ in range(programs)]
        for index in range(tiles):
            when, program = free[0]
            hands[program].append(index)
            heapq.heapreplace(free, (when + cost[index], program))
    table = np.zeros((programs, 3 + max(map(len, hands))), np.int32)
    for row, hand in zip(table, hands, strict=True):
        row[0], row[1 : 1 + len(hand)] = len(hand), hand
    return table


def deal_by_ranges(call: Call, programs: int, kv_block: int, ranges):
    """Deals the query tiles out, as `deal` does, where segments decide what they see.

    Dealt out as if they were equally long, the tiles of one long document would not only leave the last
    program 3% behind: programs would be at four times as many heads at a time, more than the L2 cache holds.

    Args:
      ranges: int32 `[batch, q tiles, 4]`, `Call.key_blocks` of every tile.
    """
    even = deal(call, programs, kv_block, True)
    if not call.causal:
        return jnp.asarray(even)
    causal = deal(call, programs, kv_block, False)
    width = max(even.shape[1], causal.shape[1])
    even, causal = (np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in (even, causal))
    most = call.batch * sum(int(call.blocks_up_to(tile, kv_block)) for tile in range(call.q_tiles))
    visited = (ranges[..., 3] - ranges[..., 0]).sum()
    return jnp.where(visited >= _NEARLY_CAUSAL * most, causal, even)


def _divide(index, by):
    """Quotient and remainder, in a kernel or of numpy arrays."""
    if isinstance(index, np.ndarray):
        return divmod(index, by)
    return lax.div(index, by), lax.rem(index, by)


def visible_blocks(call, q_segments, kv_segments, kv_block):
    """Which pairs of a query tile and a key block are visible at all, and which wholly.

    Args:
      call: what is static.
      q_segments, kv_segments: ids `[batch, q_len]` and `[batch, kv_len]`.
      kv_block: keys of a block.

    Returns:
      Two bool arrays `[batch, query tiles, key blocks]`.
    """
    first_row = jnp.arange(call.q_tiles)[:, None] * TILE + call.offset  # The last key its first query sees.
    first_column = jnp.arange(-(-call.kv_len // kv_block)) * kv_block
    q_low, q_high = (x[..., None] for x in _extremes(q_segments, TILE))
    kv_low, kv_high = (x[:, None] for x in _extremes(kv_segments, kv_block))
    some = (kv_low <= q_high) & (kv_high >= q_low)
    whole = (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
    whole &= first_column + kv_block <= call.kv_len
    if call.causal:
        some &= first_column < first_row + TILE
        whole &= first_column + kv_block - 1 <= first_row
    return some, whole


def _extremes(segments, block):
    """Smallest and largest id of every block: `[batch, blocks]` each."""
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), mode="edge")
    blocked = padded.reshape(padded.shape[0], -1, block)
    return blocked.min(-1), blocked.max(-1)


def between(some):
    """Also the blocks between the first and the last visible one along the last axis."""
    return (jnp.cumsum(some, -1) > 0) & (jnp.cumsum(some[..., ::-1], -1)[..., ::-1] > 0)


def ranges(some, whole):
    """The block ranges along the last axis that a tile visits: int32 `[..., 4]`.

    Entries 0 and 3 bound the blocks that are visible at all (at least one block, so that a tile that sees
    nothing still runs and writes its result); 1 and 2 bound the last run of wholly visible ones.
    """
    position = jnp.arange(some.shape[-1])
    first = jnp.argmax(some, -1)
    last = jnp.maximum(jnp.max(jnp.where(some, position + 1, 0), -1), first + 1)
    whole_last = jnp.max(jnp.where(whole, position + 1, 0), -1)
    gap = ~whole & (position < whole_last[..., None])
    whole_first = jnp.max(jnp.where(gap, position + 1, 0), -1)
    return jnp.stack([first, whole_first, whole_last, last], -1).astype(jnp.int32)

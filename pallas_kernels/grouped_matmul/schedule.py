"""What the persistent kernels work through: tiles of rows, and groups, computed on the device from the sizes.

A tile never spans two groups, so the number of tiles follows the rows present: `rows / tile + groups`
at most. Tiles start at multiples of 8 rows, which is what the tensor copy engine can address in a
swizzled layout; the rows of a tile that belong to its group are `[low, high)`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

ALIGN = 8


def row_bounds(group_sizes: Int[Array, " groups"]):
    """First row, and row after the last, of each group."""
    index = jnp.arange(group_sizes.shape[0])
    # A masked sum instead of cumsum: XLA fuses it with what follows into one small kernel.
    ends = jnp.sum(jnp.where(index[None, :] <= index[:, None], group_sizes[None, :], 0), axis=1)
    return (ends - group_sizes).astype(jnp.int32), ends.astype(jnp.int32)


def max_row_tiles(rows: int, groups: int, tile_rows: int) -> int:
    """Tiles that `row_tiles` has room for: the most that any sizes can need, rows past the sum included."""
    return (rows + (groups + 1) * (ALIGN - 1)) // tile_rows + groups + 1


def row_tiles(
    group_sizes: Int[Array, " groups"], rows: int, tile_rows: int
) -> tuple[Int[Array, "tiles 4"], Int[Array, "1"]]:
    """Tiles of rows in order, and how many there are.

    Args:
      group_sizes: rows of each group, any sizes, zeros allowed.
      rows: rows of the operand; those past the sum form one more group, numbered `groups`.
      tile_rows: rows of a tile, a multiple of 8.

    Returns:
      For every tile its group, first row (a multiple of 8), `low` and `high`; entries past the count
      are meaningless. And the count.
    """
    groups = group_sizes.shape[0]
    starts, ends = row_bounds(group_sizes)
    starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, jnp.int32(rows))
    aligned = starts // ALIGN * ALIGN
    tiles = jnp.where(ends > starts, -((aligned - ends) // tile_rows), 0)
    first, last = row_bounds(tiles)
    tile = jnp.arange(max_row_tiles(rows, groups, tile_rows), dtype=jnp.int32)
    group = jnp.sum(tile[:, None] >= last[None, :], axis=1, dtype=jnp.int32)
    at = jnp.minimum(group, groups)
    start = aligned[at] + (tile - first[at]) * tile_rows
    low, high = jnp.maximum(starts[at], start), jnp.minimum(ends[at], start + tile_rows)
    return jnp.stack([group, start, low, high], axis=1), last[-1:]


def groups_by_size(group_sizes: Int[Array, " groups"]) -> Int[Array, "groups 4"]:
    """Groups from the largest to the smallest: group, first row, row after the last, zero.

    A persistent kernel that starts with the long ones ends with all multiprocessors busy.
    """
    starts, ends = row_bounds(group_sizes)
    index = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    size, other = group_sizes[:, None], group_sizes[None, :]
    before = (other > size) | ((other == size) & (index[None, :] < index[:, None]))
    rank = jnp.sum(before, axis=1)
    table = jnp.stack([index, starts, ends, jnp.zeros_like(index)], axis=1)
    return jnp.sum(jnp.where(rank[None, :, None] == index[:, None, None], table[None], 0), axis=1)

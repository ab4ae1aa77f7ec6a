"""Decoding attention for Hopper in Pallas Mosaic GPU: which calls it takes, and how the work is shared out.

The kernels are in `mosaic_gpu_split` (reads the cache) and `mosaic_gpu_combine` (merges partial results).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.mla_attention import mosaic_gpu as hopper

# What a sequence costs a group beside its blocks, in blocks: queries in, partial result out. An estimate.
_SEQUENCE_COST = 1


def unsupported(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale) -> str | None:
    """Why this implementation cannot run the call, with the nearest supported choice."""
    del lengths, c_kv_scale, k_rope_scale
    if jax.__version_info__ < hopper.MINIMUM_JAX:
        return f"JAX {jax.__version__} is older than 0.11.2; install the gpu extra, or use 'blocked'"
    if implementations.platform() != "gpu":
        return "it is written for Hopper GPUs; use 'blocked'"
    if not hopper.on_hopper():
        return "the GPU is not of the Hopper generation (compute capability 9.0); use 'blocked'"
    if q.dtype != jnp.bfloat16 or c_kv.dtype not in (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
        taken = "bfloat16 queries, and caches in bfloat16, int8 and float8_e4m3fn"
        return f"queries are {q.dtype}, the cache {c_kv.dtype}; it takes {taken}; use 'blocked'"
    if 0 in q.shape or 0 in c_kv.shape:
        return "an empty axis; use 'blocked'"
    rank, rope = c_kv.shape[-1], k_rope.shape[-1]
    if rank not in (128, 256, 384, 512) or rope != 64:
        return f"widths {rank} and {rope}; it takes 128, 256, 384 or 512, and 64; use 'blocked'"
    slots = c_kv.shape[1]
    if page_table is None:
        if slots % 8:
            return f"capacity {slots}; it takes multiples of 8; use 'blocked'"
    else:
        # TMA writes the factors of codes to whole 128 bytes.
        small = (8, 16, 32) if c_kv.dtype == jnp.bfloat16 else (32,)
        if slots not in small and slots % 64:
            taken = ", ".join(map(str, small))
            return f"page size {slots}; it takes {taken} and multiples of 64; use 'blocked'"
    if q.shape[1] * q.shape[2] > (64 if c_kv.dtype == jnp.bfloat16 else 16) * hopper.multiprocessors():
        return f"{q.shape[1]} queries of {q.shape[2]} heads: too many rows; use 'blocked'"
    return None


def attention(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale, *, scale):
    """Returns the output `[batch, s_q, heads, rank]` and the log-sum-exp `[batch, s_q, heads]`."""
    from pallas_kernels.mla_attention.mosaic_gpu_common import ROWS, loader_threads
    from pallas_kernels.mla_decode import mosaic_gpu_combine, mosaic_gpu_few_rows, mosaic_gpu_split

    if scale <= 0:  # The kernel folds a positive scale into the exponent.
        q, scale = (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)
    batch, s_q, heads, _ = q.shape
    few = c_kv_scale is not None or s_q * heads <= mosaic_gpu_few_rows.ROWS
    tile_rows = mosaic_gpu_few_rows.ROWS if few else ROWS
    tiles = -(-s_q * heads // tile_rows)
    call = mosaic_gpu_split.Call(
        *(batch, s_q, heads, c_kv.shape[-1], k_rope.shape[-1], c_kv.shape[1], page_table is not None, scale),
        *(max(1, hopper.multiprocessors() // tiles), loader_threads(q), tile_rows),
    )
    rows = q.reshape(batch, call.rows, -1)
    # TMA moves boxes of 8 rows; few rows are whole tiles.
    rows = jnp.pad(rows, ((0, 0), (0, -call.rows % (tile_rows if few else 8)), (0, 0)))
    capacity = call.slots if page_table is None else call.slots * page_table.shape[1]
    lengths = jnp.clip(lengths, 0, capacity)
    edges, bounds = share_out(lengths, call.groups, mosaic_gpu_split.BLOCK)
    if few:
        factors = c_kv_scale, k_rope_scale
        parts, lses = mosaic_gpu_few_rows.split(
            rows, c_kv, k_rope, *factors, lengths, edges, page_table, call=call
        )
    else:
        parts, lses = mosaic_gpu_split.split(rows, c_kv, k_rope, lengths, edges, page_table, call=call)
    out, lse = mosaic_gpu_combine.combine(parts, lses, bounds, call=call)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def share_out(lengths, groups: int, block: int):
    """Equal shares of all sequences' blocks for groups of programs, along the sequences one after another.

    Args:
      lengths: int32 `[batch]`.
      groups: how many shares.
      block: entries of a block.

    Returns:
      int32 `[groups + 1, 2]`: the sequence and block at which each group starts, and the end; and int32
      `[batch, 2]`: the first partial result of each sequence, and the end of its partial results, where that
      of group g of sequence b is number b + g.
    """
    batch = lengths.shape[0]
    blocks = -(-lengths // block)
    cost = jnp.where(blocks > 0, blocks + _SEQUENCE_COST, 0)
    number = jnp.arange(batch)
    start = jnp.sum(jnp.where(number < number[:, None], cost, 0), 1)  # Sums as one fused kernel.
    share = jnp.maximum(1, -(-jnp.sum(cost) // groups))
    edge = jnp.arange(groups + 1) * share
    sequence = jnp.sum(start + cost <= edge[:, None], 1)
    inside = sequence < batch
    known = jnp.minimum(sequence, batch - 1)
    block_ = jnp.where(inside, edge - start[known], 0)
    # What a sequence costs beside its blocks comes after them.
    over = inside & (block_ >= blocks[known])
    sequence, block_ = jnp.where(over, sequence + 1, sequence), jnp.where(over, 0, block_)
    first, last = start // share, (start + blocks - 1) // share
    bounds = jnp.stack([number + first, number + last + 1], 1)
    bounds = jnp.where(blocks[:, None] > 0, bounds, 0)
    return jnp.stack([sequence, block_], 1).astype(jnp.int32), bounds.astype(jnp.int32)

"""Decoding attention for Hopper in Pallas Mosaic GPU: which calls it takes, and which kernels they run.

One kernel reads the cache, that of `mosaic_gpu_split` or of `mosaic_gpu_few_rows`; `mosaic_gpu_pieces` is how
its programs divide the work. `mosaic_gpu_combine` merges partial results.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import implementations
from pallas_kernels.mla_attention import mosaic_gpu as hopper


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


def attention(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale, *, scale, alike=False):
    """Returns the output `[batch, s_q, heads, rank]` and the log-sum-exp `[batch, s_q, heads]`."""
    from pallas_kernels.mla_attention.mosaic_gpu_common import ROWS, loader_threads
    from pallas_kernels.mla_decode import (
        mosaic_gpu_combine,
        mosaic_gpu_few_rows,
        mosaic_gpu_pieces,
        mosaic_gpu_split,
    )

    if scale <= 0:  # The kernel folds a positive scale into the exponent.
        q, scale = (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)
    batch, s_q, heads, _ = q.shape
    # Choices by what one query needs are the same for any number of them.
    rows_alike = heads if alike else s_q * heads
    few = c_kv_scale is not None or rows_alike <= mosaic_gpu_few_rows.ROWS
    tile_rows = mosaic_gpu_few_rows.ROWS if few else ROWS
    groups = max(1, hopper.multiprocessors() // -(-rows_alike // tile_rows))
    slots = c_kv.shape[1]
    capacity = slots if page_table is None else slots * page_table.shape[1]
    call = mosaic_gpu_split.Call(
        *(batch, s_q, heads, c_kv.shape[-1], k_rope.shape[-1]),
        *(slots, capacity, page_table is not None, scale),
        *(groups, mosaic_gpu_pieces.splits(batch, groups) if alike else 0),
        *(loader_threads(q), tile_rows),
    )
    rows = q.reshape(batch, call.rows, -1)
    # TMA moves boxes of 8 rows; few rows are whole tiles.
    rows = jnp.pad(rows, ((0, 0), (0, -call.rows % (tile_rows if few else 8)), (0, 0)))
    if few:
        factors = c_kv_scale, k_rope_scale
        found = mosaic_gpu_few_rows.split(rows, c_kv, k_rope, *factors, lengths, page_table, call=call)
    else:
        found = mosaic_gpu_split.split(rows, c_kv, k_rope, lengths, page_table, call=call)
    out, lse = mosaic_gpu_combine.combine(*found, call=call)
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])

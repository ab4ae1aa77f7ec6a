"""Attention for Hopper GPUs in Pallas Mosaic GPU: which calls it takes, padding, and which blocks are visible.

The kernels are in `mosaic_gpu_forward` and `mosaic_gpu_backward`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import implementations

MINIMUM_JAX = (0, 11, 2)
WORKSPACE = 2 << 30
_MULTIPROCESSORS = 132  # of an H100 or H200, for compilation away from the card


def unsupported(q, k, v, k_rope, q_segments, kv_segments, *, causal) -> str | None:
    """Why this implementation cannot run the call, with the nearest supported choice."""
    del k_rope, q_segments, kv_segments, causal
    if jax.__version_info__ < MINIMUM_JAX:
        return f"JAX {jax.__version__} is older than 0.11.2; install the gpu extra, or use 'cudnn' or 'chunked'"
    if implementations.platform() != "gpu":
        return "it is written for Hopper GPUs; use 'chunked' or 'reference'"
    if not _on_hopper():
        return "the GPU is not of the Hopper generation (compute capability 9.0); use 'cudnn' or 'chunked'"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; it takes bfloat16; use 'chunked'"
    if 0 in q.shape or 0 in k.shape:
        return "an empty axis; use 'chunked'"
    d_qk, d_v = q.shape[-1], v.shape[-1]
    if d_qk % 64 or d_v % 64 or not (64 <= d_v <= 128 and d_v <= d_qk <= 192):
        taken = "multiples of 64, at most 192 for queries and keys and 128 for values, these not the wider"
        return f"widths {d_qk} and {d_v}; it takes {taken}; use 'chunked'"
    return None


@functools.cache
def _gpus():
    try:
        return jax.local_devices(backend="gpu")
    except RuntimeError:
        return []


def _on_hopper() -> bool:
    """True as well without any GPU: then another machine's is compiled for."""
    return all(device.compute_capability == "9.0" for device in _gpus())


def multiprocessors() -> int:
    return _gpus()[0].core_count if _gpus() else _MULTIPROCESSORS


def visible_blocks(q_segments, kv_segments, *, q_len, kv_len, q_block, kv_block, causal):
    """Which pairs of a query block and a key block are visible at all, and which wholly.

    Returns:
      Two bool arrays `[batch or 1, query blocks, key blocks]`.
    """
    q_blocks, kv_blocks = -(-q_len // q_block), -(-kv_len // kv_block)
    first_row = jnp.arange(q_blocks)[:, None] * q_block + kv_len - q_len  # The last key its first query sees.
    first_column = jnp.arange(kv_blocks) * kv_block
    some = jnp.ones((1, q_blocks, kv_blocks), bool)
    whole = some & (first_column + kv_block <= kv_len)
    if causal:
        some &= first_column < first_row + q_block
        whole &= first_column + kv_block - 1 <= first_row
    if q_segments is not None:
        q_low, q_high = _extremes(q_segments, q_block)
        kv_low, kv_high = (x[:, None] for x in _extremes(kv_segments, kv_block))
        q_low, q_high = q_low[..., None], q_high[..., None]
        some &= (kv_low <= q_high) & (kv_high >= q_low)
        whole &= (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
    return some, whole


def _extremes(segments, block):
    """Smallest and largest id of every block: `[batch, blocks]` each."""
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), mode="edge")
    blocked = padded.reshape(padded.shape[0], -1, block)
    return blocked.min(-1), blocked.max(-1)


def ranges(some, whole):
    """The block ranges along the last axis that a tile visits: int32 `[..., 4]`.

    Entries 0 and 3 bound the blocks that are visible at all (at least one block, so that a tile that sees
    nothing still runs and writes its result); 1 and 2 bound the last run of wholly visible ones.
    """
    count = some.shape[-1]
    position = jnp.arange(count)
    first = jnp.argmax(some, -1)
    last = jnp.maximum(jnp.max(jnp.where(some, position + 1, 0), -1), first + 1)
    whole_last = jnp.max(jnp.where(whole, position + 1, 0), -1)
    gap = ~whole & (position < whole_last[..., None])
    whole_first = jnp.max(jnp.where(gap, position + 1, 0), -1)
    return jnp.stack([first, whole_first, whole_last, last], -1).astype(jnp.int32)


def _pad_rows(array, multiple):
    if array is None:
        return None
    return jnp.pad(array, [(0, 0), (0, -array.shape[1] % multiple)] + [(0, 0)] * (array.ndim - 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q, k, v, k_rope, q_segments, kv_segments, *static):
    return _forward(q, k, v, k_rope, q_segments, kv_segments, *static)[0]


def attention(
    q, k, v, k_rope, q_segments, kv_segments, *, scale, causal, config=None, workspace=WORKSPACE
):
    """Returns the output `[batch, q_len, heads, d_v]` and the log-sum-exp `[batch, heads, q_len]`.

    `config` gives the tiles of the forward kernel; `workspace` the bytes that the backward pass may take for dS
    of some heads at a time (less than one head needs: dS is recomputed).
    """
    if scale <= 0:  # The kernels fold a positive scale into the exponent.
        q, scale = (-q, -scale) if scale < 0 else (jnp.zeros_like(q), 1.0)
    if k_rope is not None and (k.shape[-1] % 64 or k_rope.shape[-1] % 64):
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
        k, k_rope = jnp.concatenate([k, shared], -1), None
    return _attention(q, k, v, k_rope, q_segments, kv_segments, scale, causal, config, workspace)


def _forward(q, k, v, k_rope, q_segments, kv_segments, scale, causal, config, workspace):
    del workspace
    from pallas_kernels.mla_attention import mosaic_gpu_forward as kernel

    batch, q_len, heads, d_qk = q.shape
    kv_len, kv_heads, d_k = k.shape[1:]
    config = config or kernel.default_config(d_qk, v.shape[-1])
    block_ranges = None
    if q_segments is not None:
        visible = visible_blocks(
            q_segments, kv_segments, q_len=q_len, kv_len=kv_len,
            q_block=kernel.TILE_Q, kv_block=config.block_kv, causal=causal,
        )  # fmt: skip
        block_ranges = ranges(*visible)
    call = kernel.Call(
        batch, heads, kv_heads, -(-q_len // kernel.TILE_Q), kv_len, kv_len - q_len, causal, scale,
        d_k, d_qk, v.shape[-1], config,
    )  # fmt: skip
    # TMA moves boxes of 8 rows; what it reads beyond the operands' ends is zero.
    out, lse = kernel.forward(
        *(_pad_rows(array, 8) for array in (q, k, v, k_rope)),
        _pad_rows(q_segments, kernel.TILE_Q),
        _pad_rows(kv_segments, config.block_kv),
        block_ranges,
        call=call,
        multiprocessors=multiprocessors(),
    )
    out, lse = out[:, :q_len], lse[..., :q_len]
    return (out, lse), (q, k, v, k_rope, q_segments, kv_segments, out, lse)


def _backward(scale, causal, config, workspace, saved, cotangents):
    del config
    from pallas_kernels.mla_attention import mosaic_gpu_backward as kernel
    from pallas_kernels.mla_attention import mosaic_gpu_queries

    q, k, v, k_rope, q_segments, kv_segments, out, lse = saved
    d_out, d_lse = cotangents
    batch, q_len, heads, d_qk = q.shape
    kv_len, kv_heads, d_k = k.shape[1:]
    # d logits = p * (d p - delta), and the log-sum-exp's own gradient adds p * d_lse.
    delta = jnp.einsum("bshd,bshd->bhs", out, d_out, preferred_element_type=jnp.float32) - d_lse
    missing = ((0, 0), (0, 0), (0, -q_len % kernel.TILE))
    shift = jnp.pad(jnp.where(lse == -jnp.inf, -jnp.inf, lse * (-1 / scale)), missing, constant_values=-jnp.inf)
    padded = [_pad_rows(array, 8) for array in (q, k, v, k_rope, d_out)]
    operands = [*padded, shift, jnp.pad(-delta, missing)]
    operands += [_pad_rows(ids, kernel.TILE) for ids in (q_segments, kv_segments)]
    by_query = by_key = None
    if q_segments is not None:
        visible = functools.partial(
            visible_blocks, q_segments, kv_segments, q_len=q_len, kv_len=kv_len, q_block=kernel.TILE, causal=causal
        )
        by_query = ranges(*visible(kv_block=kernel.BLOCK))
        some, whole = visible(kv_block=kernel.TILE)
        # What lies between a query tile's first and last key block counts as visible: dS is read there.
        some = (jnp.cumsum(some, -1) > 0) & (jnp.cumsum(some[..., ::-1], -1)[..., ::-1] > 0)
        by_key = ranges(some.swapaxes(1, 2), whole.swapaxes(1, 2))

    scores_of_a_head = 2 * batch * heads // kv_heads * (q_len + kernel.TILE) * (kv_len + kernel.TILE)
    with_scores = scores_of_a_head <= workspace
    count = min(kv_heads, workspace // scores_of_a_head) if with_scores else kv_heads
    count = next(n for n in range(count, 0, -1) if kv_heads % n == 0)
    parts = []
    for first in range(0, kv_heads, count):
        call = kernel.Call(
            batch, heads, kv_heads, q_len, kv_len, causal, scale, d_k, d_qk, v.shape[-1], (first, count)
        )
        dk, dv, d_rope, scores = kernel.keys_values(*operands, by_key, call=call, with_scores=with_scores)
        if with_scores:
            dq = mosaic_gpu_queries.from_scores(scores, padded[1], padded[3], by_query, call=call)
        else:
            dq = mosaic_gpu_queries.recomputed(*operands, by_query, call=call)
        parts.append((dq[:, :q_len], dk[:, :kv_len], dv[:, :kv_len], d_rope))
    dq, dk, dv = (jnp.concatenate([part[i] for part in parts], 2) for i in range(3))
    shared = None
    if k_rope is not None:
        shared = sum(part[3][:, :kv_len].sum(2, dtype=jnp.float32) for part in parts).astype(k_rope.dtype)
    return dq, dk, dv, shared, None, None


_attention.defvjp(_forward, _backward)

"""Decoding attention in plain JAX, for any platform: it reads the cache a block at a time.

The loop ends at run time where the longest sequence does, so that a step costs what is in the cache and not
the cache's capacity. Each block goes through the online softmax (Milakov and Gimelshein 2018). Codes of a
quantised cache are multiplied as they are; their scales enter the logits and the weights.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import implementations

# Cache entries of a step, or as many whole pages: what a CPU's cache holds; elsewhere few launches.
BLOCKS = {"cpu": 128, "gpu": 2048, "tpu": 2048}

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def unsupported(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale
    return None


def attention(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale, *, scale, block=None):
    """Returns the output `[batch, s_q, heads, rank]` and the log-sum-exp `[batch, s_q, heads]`."""
    batch, s_q, heads, _ = q.shape
    rank, slots = c_kv.shape[-1], c_kv.shape[1]
    block = block or BLOCKS[implementations.platform()]
    capacity = slots if page_table is None else slots * page_table.shape[1]
    if not capacity:
        return jnp.zeros((*q.shape[:3], rank), q.dtype), jnp.full(q.shape[:3], -jnp.inf)
    size = min(block, capacity) if page_table is None else slots * max(1, min(block, capacity) // slots)
    q_latent, q_rope = q[..., :rank], q[..., rank:]
    seen_by = lengths[:, None] - s_q + jnp.arange(s_q) + 1  # [batch, s_q]

    def read(array, start):
        """`size` entries from `start` on, in the dtype of q; scales stay float32."""
        if page_table is None:
            part = jax.lax.dynamic_slice_in_dim(array, start, size, 1)
        else:
            numbers = jax.lax.dynamic_slice_in_dim(page_table, start // slots, size // slots, 1)
            part = jnp.take(array, numbers, axis=0, mode="clip").reshape(batch, size, *array.shape[2:])
        return part if array.ndim == 2 else part.astype(q.dtype)

    def step(i, carry):
        out, peak, total = carry
        # The last block moves back to end at the capacity; what it repeats is masked.
        start = jnp.minimum(i * size, capacity - size)
        values = read(c_kv, start)
        logits = _dot("bshr,btr->bsht", q_latent, values)
        rope = _dot("bshp,btp->bsht", q_rope, read(k_rope, start))
        value_scale = None if c_kv_scale is None else read(c_kv_scale, start)[:, None, None]
        if value_scale is not None:
            logits, rope = logits * value_scale, rope * read(k_rope_scale, start)[:, None, None]
        position = start + jnp.arange(size)
        visible = (position >= i * size) & (position < seen_by[..., None])
        logits = jnp.where(visible[:, :, None], (logits + rope) * scale, -jnp.inf)
        new_peak = jnp.maximum(peak, logits.max(-1))
        # A query that has seen nothing keeps -inf: subtract 0 there, so that no NaN arises.
        below = jnp.where(new_peak == -jnp.inf, 0, new_peak)
        weights = jnp.exp(logits - below[..., None])
        factor = jnp.exp(peak - below)
        total = total * factor + weights.sum(-1)
        if value_scale is not None:
            weights = weights * value_scale
        out = out * factor[..., None] + _dot("bsht,btr->bshr", weights.astype(q.dtype), values)
        return out, new_peak, total

    start = (
        jnp.zeros((batch, s_q, heads, rank), jnp.float32),
        jnp.full((batch, s_q, heads), -jnp.inf, jnp.float32),
        jnp.zeros((batch, s_q, heads), jnp.float32),
    )
    longest = jnp.minimum(jnp.max(lengths, initial=0), capacity)
    out, peak, total = jax.lax.fori_loop(0, -(-longest // size), step, start)
    seen = total > 0
    out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1)[..., None], 0)
    lse = jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
    return out.astype(q.dtype), lse

"""The meaning of `mla_decode`: plain `jax.numpy` over the whole capacity, float32 throughout."""

import jax.numpy as jnp


def unsupported(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale
    return None


def _contiguous(cache, scales, page_table):
    """Values in float32, `[batch, capacity, width]`."""
    cache = cache.astype(jnp.float32)
    if scales is not None:
        cache *= scales[..., None]
    if page_table is None:
        return cache
    pages = jnp.take(cache, page_table, axis=0, mode="clip")
    return pages.reshape(page_table.shape[0], -1, cache.shape[-1])


def attention(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale, *, scale):
    """Returns the output `[batch, s_q, heads, rank]` and the log-sum-exp `[batch, s_q, heads]`."""
    values = _contiguous(c_kv, c_kv_scale, page_table)
    keys = jnp.concatenate([values, _contiguous(k_rope, k_rope_scale, page_table)], -1)
    logits = jnp.einsum("bshd,btd->bhst", q.astype(jnp.float32), keys) * scale
    s_q, capacity = logits.shape[2:]
    seen_by = lengths[:, None] - s_q + jnp.arange(s_q) + 1
    visible = (jnp.arange(capacity) < seen_by[..., None])[:, None]
    peak = jnp.max(jnp.where(visible, logits, -jnp.inf), -1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(logits - peak), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhst,btr->bshr", weights / jnp.where(total > 0, total, 1), values)
    lse = jnp.where(total > 0, jnp.log(total) + peak, -jnp.inf)[..., 0]
    return out.astype(q.dtype), jnp.moveaxis(lse, 1, 2)

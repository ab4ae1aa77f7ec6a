"""The meaning of `mla_attention`: plain `jax.numpy`, float32 softmax, the whole score matrix at once."""

import functools

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def unsupported(q, k, v, k_rope, q_segments, kv_segments, *, causal) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del q, k, v, k_rope, q_segments, kv_segments, causal
    return None


def attention(q, k, v, k_rope, q_segments, kv_segments, *, scale, causal):
    """Returns the output `[batch, q_len, heads, d_v]` and the log-sum-exp `[batch, heads, q_len]`."""
    batch, q_len, heads, d_qk = q.shape
    kv_len, kv_heads, d_k = k.shape[1:]
    grouped = q.reshape(batch, q_len, kv_heads, heads // kv_heads, d_qk)
    logits = _dot("bsgrd,btgd->bgrst", grouped[..., :d_k], k)
    if k_rope is not None:
        logits += _dot("bsgrd,btd->bgrst", grouped[..., d_k:], k_rope)
    logits *= scale

    visible = jnp.ones((1, q_len, kv_len), bool)
    if causal:
        visible &= jnp.arange(kv_len) <= jnp.arange(q_len)[:, None] + kv_len - q_len
    if q_segments is not None:
        visible &= q_segments[:, :, None] == kv_segments[:, None, :]
    visible = visible[:, None, None]
    logits = jnp.where(visible, logits, -jnp.inf)

    # A query that sees nothing has maximum -inf: subtract 0 there, so that no NaN arises forward or backward.
    peak = jnp.max(logits, -1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0))
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    probabilities = weights / jnp.where(seen, total, 1)
    out = _dot("bgrst,btgd->bsgrd", probabilities.astype(v.dtype), v)
    safe_total = jnp.log(jnp.where(seen, total, 1)) + jnp.where(seen, peak, 0)
    lse = jnp.where(seen, safe_total, -jnp.inf)[..., 0].reshape(batch, heads, q_len)
    out = out.reshape(batch, q_len, heads, v.shape[-1]).astype(q.dtype)
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")

"""Attention in plain JAX for short sequences on CPU: a few strips of queries, unrolled.

A strip of queries sees a prefix of the keys (causal): its scores are one product with exactly that prefix,
and what lies above the diagonal is computed within the strip only. Heads come before positions once, at the
start: every product is then a batch of plain matrix products, which XLA's CPU library runs fastest. The
backward pass recomputes the probabilities from the log-sum-exp, as in FlashAttention-2 (Dao 2023).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

LONGEST = 1024  # Beyond it a strip's scores (rows x length, for every head) no longer stay small.
ROWS = 128  # Queries a strip, unless that makes more than `MOST` strips: each costs compile time.
MOST = 4

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def unsupported(q, k, v, k_rope, q_segments, kv_segments, *, causal) -> str | None:
    """Why this implementation cannot run the call, or None."""
    del v, k_rope, q_segments, kv_segments, causal
    longest = max(q.shape[1], k.shape[1])
    if longest > LONGEST:
        return f"{longest} positions are more than {LONGEST}; 'chunked' takes any length"
    return None


def attention(q, k, v, k_rope, q_segments, kv_segments, *, scale, causal, rows=ROWS):
    """Returns the output `[batch, q_len, heads, d_v]` and the log-sum-exp `[batch, heads, q_len]`."""
    return _attention(q, k, v, k_rope, q_segments, kv_segments, scale, causal, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, k, v, k_rope, q_segments, kv_segments, scale, causal, rows):
    return _forward(q, k, v, k_rope, q_segments, kv_segments, scale, causal, rows)[0]


class _Strip(NamedTuple):
    """Queries `start` to `end`, and the first `seen` keys: all that any of them may see."""

    start: int
    end: int
    seen: int

    def of(self, array):
        """The strip's rows of an array `[batch, kv_heads, group, q_len, ...]`."""
        return array[:, :, :, self.start : self.end]

    def mask(self, q_len, kv_len, q_segments, kv_segments, causal):
        """Which keys each query sees, `[batch or 1, 1, 1, rows, seen]`; None: all of them."""
        visible = None
        if causal:
            rows = jnp.arange(self.start, self.end)[:, None]
            visible = (jnp.arange(self.seen) <= rows + kv_len - q_len)[None]
        if q_segments is not None:
            same = q_segments[:, self.start : self.end, None] == kv_segments[:, None, : self.seen]
            visible = same if visible is None else visible & same
        return None if visible is None else visible[:, None, None]


def _strips(q_len, kv_len, causal, rows):
    rows = max(rows, -(-q_len // MOST))
    found = []
    for start in range(0, q_len, rows):
        end = min(start + rows, q_len)
        found.append(_Strip(start, end, max(0, min(kv_len, end + kv_len - q_len)) if causal else kv_len))
    return found


def _heads_first(array, group=1):
    """`[batch, length, kv_heads * group, d]` to `[batch, kv_heads, group, length, d]`."""
    batch, length, heads, width = array.shape
    split = array.reshape(batch, length, heads // group, group, width)
    return split.transpose(0, 2, 3, 1, 4)


def _heads_last(array):
    batch, kv_heads, group, length, width = array.shape
    return array.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def _key(k, k_rope):
    """Whole keys `[batch, kv_heads, kv_len, d_qk]`."""
    key = _heads_first(k)[:, :, 0]
    if k_rope is None:
        return key
    shared = jnp.broadcast_to(k_rope[:, None], (*key.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([key, shared], -1)


def _logits(strip, query, key, mask, scale):
    logits = _dot("bhgqd,bhkd->bhgqk", strip.of(query), key[:, :, : strip.seen]) * scale
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)


def _forward(q, k, v, k_rope, q_segments, kv_segments, scale, causal, rows):
    q_len, kv_len, kv_heads = q.shape[1], *k.shape[1:3]
    query, key = _heads_first(q, q.shape[2] // kv_heads), _key(k, k_rope)
    value = _heads_first(v)[:, :, 0]
    outs, lses = [], []
    for strip in _strips(q_len, kv_len, causal, rows):
        if not strip.seen:
            shape = strip.of(query).shape[:-1]
            outs.append(jnp.zeros((*shape, v.shape[-1]), q.dtype))
            lses.append(jnp.full((*shape, 1), -jnp.inf))
            continue
        mask = strip.mask(q_len, kv_len, q_segments, kv_segments, causal)
        logits = _logits(strip, query, key, mask, scale)
        peak = logits.max(-1, keepdims=True)
        peak = jnp.where(jnp.isfinite(peak), peak, 0)  # A row that sees nothing: all its logits are -inf.
        weights = jnp.exp(logits - peak)
        total = weights.sum(-1, keepdims=True)
        out = _dot("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), value[:, :, : strip.seen])
        outs.append((out / jnp.where(total > 0, total, 1)).astype(q.dtype))
        lses.append(peak + jnp.log(total))
    out = checkpoint_name(_heads_last(jnp.concatenate(outs, 3)), "attention_out")
    lse = jnp.concatenate(lses, 3)
    lse = checkpoint_name(lse.reshape(q.shape[0], q.shape[2], q_len), "attention_lse")
    return (out, lse), (q, k, v, k_rope, q_segments, kv_segments, out, lse)


def _plus(total, more):
    """Adds to the first keys. Not `.at[].add`: its constant indices become inputs of a `shard_map` around it,
    and the compiler of JAX 0.11.2 fails on a constant there."""
    first = total[:, :, : more.shape[2]] + more
    return lax.dynamic_update_slice(total, first, (0,) * total.ndim)


def _backward(scale, causal, rows, saved, cotangents):
    q, k, v, k_rope, q_segments, kv_segments, out, lse = saved
    d_out, d_lse = cotangents
    q_len, kv_len, kv_heads = q.shape[1], *k.shape[1:3]
    group = q.shape[2] // kv_heads
    query, key, d_rows = _heads_first(q, group), _key(k, k_rope), _heads_first(d_out, group)
    value = _heads_first(v)[:, :, 0]

    # d logits = p * (d p - delta), and the log-sum-exp's own gradient adds p * d_lse.
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_lse.transpose(0, 2, 1)
    delta = _heads_first(delta[..., None], group)
    base = jnp.where(jnp.isfinite(lse), lse, 0).reshape(q.shape[0], kv_heads, group, q_len, 1)

    d_query = []
    d_key = jnp.zeros(key.shape, jnp.float32)
    d_value = jnp.zeros(value.shape, jnp.float32)
    for strip in _strips(q_len, kv_len, causal, rows):
        if not strip.seen:
            d_query.append(jnp.zeros(strip.of(query).shape, jnp.float32))
            continue
        mask = strip.mask(q_len, kv_len, q_segments, kv_segments, causal)
        p = jnp.exp(_logits(strip, query, key, mask, scale) - strip.of(base))
        dp = _dot("bhgqd,bhkd->bhgqk", strip.of(d_rows), value[:, :, : strip.seen])
        ds = (p * (dp - strip.of(delta)) * scale).astype(q.dtype)
        d_query.append(_dot("bhgqk,bhkd->bhgqd", ds, key[:, :, : strip.seen]))
        more = _dot("bhgqk,bhgqd->bhkd", ds, strip.of(query))
        d_key = _plus(d_key, more)
        more = _dot("bhgqk,bhgqd->bhkd", p.astype(v.dtype), strip.of(d_rows))
        d_value = _plus(d_value, more)

    dq = _heads_last(jnp.concatenate(d_query, 3)).astype(q.dtype)
    d_key = d_key.transpose(0, 2, 1, 3)
    dk, dv = d_key[..., : k.shape[-1]].astype(k.dtype), d_value.transpose(0, 2, 1, 3).astype(v.dtype)
    d_rope = None if k_rope is None else d_key[..., k.shape[-1] :].sum(2).astype(k_rope.dtype)
    return dq, dk, dv, d_rope, None, None


_attention.defvjp(_forward, _backward)

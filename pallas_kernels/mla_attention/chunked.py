"""Attention in plain JAX with memory linear in the length: any platform, any shape, exact.

Scores exist for one pair of blocks at a time. Forward, each block of queries walks over the blocks of
keys it may see with the online softmax (Milakov and Gimelshein 2018); only the output and the
log-sum-exp are kept. Backward recomputes the probabilities from the log-sum-exp (FlashAttention-2,
Dao 2023, algorithm 2): each block of keys walks over the blocks of queries that may see it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 512  # rows of queries, and of keys, whose scores exist at a time

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def unsupported(q, k, v, k_rope, q_segments, kv_segments, *, causal) -> str | None:
    """Why this implementation cannot run the call; it can run any."""
    del q, k, v, k_rope, q_segments, kv_segments, causal
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, k, v, k_rope, q_segments, kv_segments, scale, causal, block):
    return _forward(q, k, v, k_rope, q_segments, kv_segments, scale, causal, block)[0]


def attention(q, k, v, k_rope, q_segments, kv_segments, *, scale, causal, block=BLOCK):
    """Returns the output `[batch, q_len, heads, d_v]` and the log-sum-exp `[batch, heads, q_len]`."""
    return _attention(q, k, v, k_rope, q_segments, kv_segments, scale, causal, block)


class _Blocks(NamedTuple):
    """Operands padded to whole blocks, query heads grouped by their key head."""

    q: jax.Array  # [batch, q_padded, kv_heads, group, d_qk]
    k: jax.Array  # [batch, kv_padded, kv_heads, d_k]
    v: jax.Array  # [batch, kv_padded, kv_heads, d_v]
    k_rope: jax.Array | None  # [batch, kv_padded, d_rope]
    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    scale: float
    causal: bool

    @property
    def counts(self):
        return self.q.shape[1] // self.q_block, self.k.shape[1] // self.kv_block

    def queries(self, i, array):
        return jax.lax.dynamic_slice_in_dim(array, i * self.q_block, self.q_block, 1)

    def keys(self, j, array):
        return jax.lax.dynamic_slice_in_dim(array, j * self.kv_block, self.kv_block, 1)

    def full_key(self, j):
        """Keys of block j with the shared part appended to every head's."""
        key = self.keys(j, self.k)
        if self.k_rope is None:
            return key
        shared = self.keys(j, self.k_rope)[:, :, None]
        return jnp.concatenate([key, jnp.broadcast_to(shared, (*key.shape[:3], shared.shape[-1]))], -1)

    def logits(self, i, j, key):
        """Scaled logits of a pair of blocks, -inf where masked: `[batch, kv_heads, group, rows, columns]`."""
        logits = _dot("bqhgd,bkhd->bhgqk", self.queries(i, self.q), key)
        rows = i * self.q_block + jnp.arange(self.q_block)[:, None]
        columns = j * self.kv_block + jnp.arange(self.kv_block)
        visible = jnp.broadcast_to(columns < self.kv_len, (1, self.q_block, self.kv_block))
        if self.causal:
            visible &= columns <= rows + self.kv_len - self.q_len
        if self.q_segments is not None:
            mine, theirs = self.queries(i, self.q_segments), self.keys(j, self.kv_segments)
            visible &= mine[:, :, None] == theirs[:, None, :]
        return jnp.where(visible[:, None, None], logits * self.scale, -jnp.inf)

    def key_blocks(self, i):
        """How many key blocks, from the first on, query block i may see."""
        count = self.counts[1]
        if not self.causal:
            return count
        end = (i + 1) * self.q_block + self.kv_len - self.q_len
        return jnp.clip(-(-end // self.kv_block), 0, count)

    def first_query_block(self, j):
        """The first query block that may see key block j."""
        if not self.causal:
            return 0
        return jnp.clip((j * self.kv_block - self.kv_len + self.q_len) // self.q_block, 0, self.counts[0])


def _pad_rows(array, multiple) -> Any:
    if array is None:
        return None
    missing = max(multiple, -(-array.shape[1] // multiple) * multiple) - array.shape[1]
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2))


def _blocks(q, k, v, k_rope, q_segments, kv_segments, scale, causal, block):
    batch, q_len, heads, d_qk = q.shape
    kv_len, kv_heads = k.shape[1:3]
    q_block, kv_block = max(1, min(block, q_len)), max(1, min(block, kv_len))
    grouped = q.reshape(batch, q_len, kv_heads, heads // kv_heads, d_qk)
    return _Blocks(
        _pad_rows(grouped, q_block),
        _pad_rows(k, kv_block),
        _pad_rows(v, kv_block),
        _pad_rows(k_rope, kv_block),
        _pad_rows(q_segments, q_block),
        _pad_rows(kv_segments, kv_block),
        q_len, kv_len, q_block, kv_block, scale, causal,
    )  # fmt: skip


def _to_rows(per_block, length):
    """`[blocks, batch, rows, ...]` to `[batch, length, ...]`."""
    joined = jnp.moveaxis(per_block, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _forward(q, k, v, k_rope, q_segments, kv_segments, scale, causal, block):
    blocks = _blocks(q, k, v, k_rope, q_segments, kv_segments, scale, causal, block)

    def one_query_block(i):
        def step(j, carry):
            peak, total, out = carry
            logits = blocks.logits(i, j, blocks.full_key(j))
            new_peak = jnp.maximum(peak, logits.max(-1))
            # Nothing seen yet: subtract 0 from -inf, so that no NaN arises.
            base = jnp.where(jnp.isfinite(new_peak), new_peak, 0)
            weights = jnp.exp(logits - base[..., None])
            keep = jnp.exp(peak - base)
            value = blocks.keys(j, blocks.v)
            update = _dot("bhgqk,bkhd->bhgqd", weights.astype(v.dtype), value)
            return new_peak, total * keep + weights.sum(-1), out * keep[..., None] + update

        # Zeros made from the operands carry their sharding and manual axes, which the loop needs.
        like = jnp.einsum("bqhg,bhd->bhgqd", blocks.queries(i, blocks.q)[..., 0], blocks.v[:, 0])
        zeros = jnp.zeros_like(like, jnp.float32)
        start = (jnp.full_like(zeros[..., 0], -jnp.inf), zeros[..., 0], zeros)
        peak, total, out = jax.lax.fori_loop(0, blocks.key_blocks(i), step, start)
        seen = total > 0
        safe = jnp.where(seen, total, 1)
        lse = jnp.where(seen, jnp.where(seen, peak, 0) + jnp.log(safe), -jnp.inf)
        return jnp.moveaxis(out / safe[..., None], 3, 1).astype(q.dtype), jnp.moveaxis(lse, 3, 1)

    out, lse = jax.lax.map(one_query_block, jnp.arange(blocks.counts[0]))
    batch, q_len, heads, _ = q.shape
    out = _to_rows(out, q_len).reshape(batch, q_len, heads, v.shape[-1])
    lse = jnp.moveaxis(_to_rows(lse, q_len).reshape(batch, q_len, heads), 1, 2)
    # Named, so that a recomputation policy can keep them: then the backward pass does not come here again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, k_rope, q_segments, kv_segments, out, lse)


def _backward(scale, causal, block, saved, cotangents):
    q, k, v, k_rope, q_segments, kv_segments, out, lse = saved
    d_out, d_lse = cotangents
    blocks = _blocks(q, k, v, k_rope, q_segments, kv_segments, scale, causal, block)
    batch, q_padded, kv_heads, group, d_qk = blocks.q.shape

    def grouped(array):  # [batch, q_len, heads, ...] to [batch, q_padded, kv_heads, group, ...]
        return _pad_rows(array.reshape(*array.shape[:2], kv_heads, group, *array.shape[3:]), blocks.q_block)

    # d logits = p * (d p - delta), and the log-sum-exp's own gradient adds p * d_lse.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - jnp.moveaxis(d_lse, 1, 2)
    safe_lse = jnp.where(jnp.isfinite(lse), lse, 0)
    d_out, delta, safe_lse = grouped(d_out), grouped(delta), grouped(jnp.moveaxis(safe_lse, 1, 2))

    def per_row(array, i):  # [batch, rows, kv_heads, group] to [batch, kv_heads, group, rows, 1]
        return jnp.moveaxis(blocks.queries(i, array), 1, 3)[..., None]

    def one_key_block(dq, j):
        key, value = blocks.full_key(j), blocks.keys(j, blocks.v)

        def step(i, carry):
            dq, dk, dv = carry
            query, d_rows = blocks.queries(i, blocks.q), blocks.queries(i, d_out)
            p = jnp.exp(blocks.logits(i, j, key) - per_row(safe_lse, i))
            dv += _dot("bhgqk,bqhgd->bkhd", p.astype(d_rows.dtype), d_rows)
            dp = _dot("bqhgd,bkhd->bhgqk", d_rows, value)
            ds = (p * (dp - per_row(delta, i)) * scale).astype(q.dtype)
            dk += _dot("bhgqk,bqhgd->bkhd", ds, query)
            mine = blocks.queries(i, dq) + _dot("bhgqk,bkhd->bqhgd", ds, key)
            return jax.lax.dynamic_update_slice_in_dim(dq, mine, i * blocks.q_block, 1), dk, dv

        start = (dq, jnp.zeros_like(key, jnp.float32), jnp.zeros_like(value, jnp.float32))
        dq, dk, dv = jax.lax.fori_loop(blocks.first_query_block(j), blocks.counts[0], step, start)
        shared = None if k_rope is None else dk[..., k.shape[-1] :].sum(2).astype(k_rope.dtype)
        return dq, (dk[..., : k.shape[-1]].astype(k.dtype), dv.astype(v.dtype), shared)

    zeros = jnp.zeros_like(blocks.q, jnp.float32)
    dq, (dk, dv, d_rope) = jax.lax.scan(one_key_block, zeros, jnp.arange(blocks.counts[1]))
    dq = dq.reshape(batch, q_padded, kv_heads * group, d_qk)[:, : q.shape[1]].astype(q.dtype)
    dk, dv = _to_rows(dk, k.shape[1]), _to_rows(dv, k.shape[1])
    return dq, dk, dv, None if d_rope is None else _to_rows(d_rope, k.shape[1]), None, None


_attention.defvjp(_forward, _backward)

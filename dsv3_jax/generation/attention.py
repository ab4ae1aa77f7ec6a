"""Attention over the cache in both forms of the same parameters: expanded for prefill, absorbed for decoding.

Every query sees what the cache holds, quantised or not, also of its own chunk: the result does not depend on
how a prompt was cut.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation.cache import LatentCache, LayerCache, as_stored, read, write
from dsv3_jax.generation.linear import Rows, alike, as_rows, linear, per_head
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.rope import Rotation, rotate, softmax_scale
from pallas_kernels import mla_attention, mla_decode


def _project(
    w: Any, h: Array, turn: Rotation, config: ModelConfig, rows: Rows | None = None
) -> tuple[Array, Array, Array]:
    """The queries [batch, seq, heads, d_qk] and the entries to cache, each [batch, seq, streams, ...]."""
    a, interleaved = config.attention, config.rope.interleaved
    if a.kind != "mla":
        q, k, v = (_by_head(h, w[name], rows) for name in ("w_q", "w_k", "w_v"))
        return rotate(q, turn, interleaved), v, rotate(k, turn, interleaved)
    rope_from = w["w_in"].shape[1] - a.qk_rope_head_dim
    q, c_kv, k_r = jnp.split(linear(h, w["w_in"], rows), [rope_from - a.kv_lora_rank, rope_from], -1)
    if "w_uq_qr" in w:
        normal = alike(rms_norm, rows, q, w["q_norm"], a.latent_norm_eps)
        q = linear(normal, w["w_uq_qr"], rows)  # DeepSeek-V3 eqs 6-8
    q_c, q_r = jnp.split(q.reshape(*q.shape[:2], a.n_heads, -1), [a.qk_nope_head_dim], -1)
    q = jnp.concatenate([q_c, rotate(q_r, turn, interleaved)], -1)  # eq 9
    c_kv = alike(rms_norm, rows, c_kv, w["kv_norm"], a.latent_norm_eps)  # eq 1
    return q, c_kv[:, :, None], rotate(k_r, turn, interleaved)[:, :, None]  # eq 3


def _by_head(h: Array, w: Float[Array, "d heads e"], rows: Rows | None) -> Array:
    return alike(lambda h, w: jnp.einsum("bsd,dhe->bshe", h, w), rows, h, w)


def _expand(w: Any, c_kv: Array, k_rope: Array, config: ModelConfig) -> tuple[Array, Array, Array | None]:
    """(k, v, k_rope) for `mla_attention` from cached entries."""
    if config.attention.kind != "mla":
        return k_rope, c_kv, None
    k_c = jnp.einsum("bsr,hnr->bshn", c_kv[:, :, 0], w["w_uk"])  # DeepSeek-V3 eq 2
    v = jnp.einsum("bsr,hrv->bshv", c_kv[:, :, 0], w["w_uv"])  # eq 5
    return k_c, v, k_rope[:, :, 0]


def _scale(config: ModelConfig) -> float:
    a = config.attention
    wide = a.qk_nope_head_dim + a.qk_rope_head_dim if a.kind == "mla" else a.head_dim
    return softmax_scale(config.rope, wide)


def expanded(
    w: Any,
    h: Float[Array, "batch seq d"],
    turn: Rotation,
    cache: LatentCache,
    where: Int[Array, "batch streams seq"],
    start: Int[Array, ""],
    block: int,
    config: ModelConfig,
) -> tuple[Float[Array, "batch seq d"], LayerCache]:
    """Attention of a chunk at positions `start`, `start + 1`, ... of every sequence, in the expanded form.

    The chunk attends to itself, and to what is cached before it in blocks of `block` positions, of which
    `start` is a multiple; the parts are joined by their log-sum-exp. `cache` has one layer. Returns the
    output after W_O, and the layer with the chunk's entries.
    """
    q, c_kv, k_rope = _project(w, h, turn, config)
    layer = write(cache.layers[0], where, c_kv, k_rope)
    c_kv, k_rope = as_stored(c_kv, layer), as_stored(k_rope, layer)
    shared = {"scale": _scale(config), "implementation": config.attention.implementation, "return_lse": True}
    k, v, k_r = _expand(w, c_kv, k_rope, config)
    out, lse = mla_attention(q, k, v, k_rope=k_r, causal=True, **shared)

    def before(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        k, v, k_r = _expand(w, *read(cache, layer, i * block, block, q.dtype), config)
        return _join(carry, mla_attention(q, k, v, k_rope=k_r, causal=False, **shared))

    out, _ = jax.lax.fori_loop(0, start // block, before, (out.astype(jnp.float32), lse))
    return linear(out.astype(h.dtype).reshape(*h.shape[:2], -1), w["w_o"]), layer


def _join(first: tuple[Array, Array], second: Any) -> tuple[Array, Array]:
    """The softmax over two sets of keys from that over each: (output, log-sum-exp [batch, heads, seq])."""
    total = jnp.logaddexp(first[1], second[1])
    share = [jnp.swapaxes(jnp.exp(lse - total), 1, 2)[..., None] for lse in (first[1], second[1])]
    return first[0] * share[0] + second[0].astype(jnp.float32) * share[1], total


def absorbed(
    w: Any,
    h: Float[Array, "batch seq d"],
    turn: Rotation,
    cache: LatentCache,
    where: Int[Array, "sequences streams newest"],
    lengths: Int[Array, " sequences"],
    config: ModelConfig,
    rows: Rows | None = None,
) -> tuple[Float[Array, "batch seq d"], LayerCache]:
    """Attention of each sequence's newest tokens, in the absorbed form (DeepSeek-V2 §2.1.2).

    q' = W_UK^T q_C lives in the latent space, all heads attend to one key [c_KV; k_R] whose value is c_KV,
    and W_UV follows. `lengths` counts the entries of each sequence, those of `h` included, its last. `cache`
    has one layer. Returns the output after W_O, and the layer with the new entries. `h` and `turn`
    are laid out as `rows` says, or [sequences, newest].
    """

    def together(x: Array) -> Array:
        """Tokens by sequence."""
        return x[: rows and rows.real].reshape(where.shape[0], where.shape[2], *x.shape[2:])

    q, c_kv, k_rope = _project(w, h, turn, config, rows)
    layer = write(cache.layers[0], where, together(c_kv), together(k_rope))
    mla = config.attention.kind == "mla"
    if mla:
        q_c, q_r = jnp.split(q, [config.attention.qk_nope_head_dim], axis=-1)
        q = jnp.concatenate([per_head(q_c, w["w_uk"], rows), q_r], -1)
    else:
        q = jnp.concatenate([jnp.zeros_like(q), q], -1)
    out = _over_streams(together(q), cache, layer, lengths, _scale(config), rows is not None)
    out = as_rows(out, rows).reshape(*q.shape[:3], -1)
    if mla:
        out = per_head(out, w["w_uv"], rows)
    return linear(out.reshape(*h.shape[:2], -1), w["w_o"], rows), layer


def _over_streams(
    q: Array, cache: LatentCache, layer: LayerCache, lengths: Array, scale: float, same: bool
) -> Array:
    """`mla_decode`, each stream a sequence of its own with its share of the heads."""
    batch, seq, heads, width = q.shape
    streams, table = cache.streams, cache.page_table
    if streams > 1:
        q = jnp.moveaxis(q.reshape(batch, seq, streams, -1, width), 2, 1).reshape(
            -1, seq, heads // streams, width
        )
        lengths = jnp.repeat(lengths, streams)
        if table is not None:
            offset = jnp.arange(streams)[:, None] * (layer.c_kv.shape[0] // streams)
            table = (table[:, None] + offset).reshape(-1, table.shape[1])
    out, _ = mla_decode(
        q,
        layer.c_kv,
        layer.k_rope,
        lengths,
        scale=scale,
        page_table=table,
        c_kv_scale=layer.c_kv_scale,
        k_rope_scale=layer.k_rope_scale,
        alike=same,
    )
    if streams > 1:
        out = jnp.moveaxis(out.reshape(batch, streams, seq, -1, out.shape[-1]), 1, 2)
    return out.reshape(batch, seq, heads, -1)

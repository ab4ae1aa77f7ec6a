"""Multi-head latent attention (DeepSeek-V2 §2.1, DeepSeek-V3 §2.1.1, eqs 1-11), the expanded form.

Keys and values are expanded from a latent c_KV that is small enough to cache, and position enters
through a decoupled part of query and key, the key's shared by all heads. The matrices that apply to
the same input are stored as one: [W_UQ; W_QR], [W_DKV; W_KR] and [W_UK; W_UV].
"""

from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import FP8Config, ModelConfig
from dsv3_jax.model.attend import attend
from dsv3_jax.model.layers import RMSNorm, linear, rms_norm, weight
from dsv3_jax.model.rope import Rotation, rotate, softmax_scale


class MLAWeights(TypedDict):
    """The parameters of one layer; `w_dq` and `q_norm` are absent without query compression."""

    w_dq: NotRequired[Float[Array, "d q_rank"]]
    q_norm: NotRequired[Float[Array, " q_rank"]]
    w_uq_qr: Float[Array, "q_in heads nope_rope"]
    w_dkv_kr: Float[Array, "d kv_rank_rope"]
    kv_norm: Float[Array, " kv_rank"]
    w_uk_uv: Float[Array, "kv_rank heads nope_v"]
    w_o: Float[Array, "heads v d"]


def queries(
    w: MLAWeights,
    h: Float[Array, "batch seq d"],
    turn: Rotation,
    config: ModelConfig,
    recipe: FP8Config | None = None,
) -> Float[Array, "batch seq heads nope_rope"]:
    """q_i = [q_C,i ; q_R,i] for every head (eqs 6-9)."""
    c_q = h
    if "w_dq" in w and "q_norm" in w:
        c_q = checkpoint_name(linear(h, w["w_dq"], recipe), "mla_latent")  # eq 6
        c_q = rms_norm(c_q, w["q_norm"], config.attention.latent_norm_eps)
    q = linear(c_q, w["w_uq_qr"], recipe)  # eqs 7 and 8
    q_c, q_r = jnp.split(q, [config.attention.qk_nope_head_dim], axis=-1)
    return jnp.concatenate([q_c, rotate(q_r, turn, config.rope.interleaved)], axis=-1)  # eq 9


def latents(
    w: MLAWeights,
    h: Float[Array, "batch seq d"],
    turn: Rotation,
    config: ModelConfig,
    recipe: FP8Config | None = None,
) -> tuple[Float[Array, "batch seq kv_rank"], Float[Array, "batch seq rope"]]:
    """(c_KV, k_R): all that generation caches of a token (eqs 1 and 3); c_KV is normalised."""
    both = checkpoint_name(linear(h, w["w_dkv_kr"], recipe), "mla_latent")
    c_kv, k_r = jnp.split(both, [config.attention.kv_lora_rank], axis=-1)
    c_kv = rms_norm(c_kv, w["kv_norm"], config.attention.latent_norm_eps)
    return c_kv, rotate(k_r, turn, config.rope.interleaved)


def keys_values(
    w: MLAWeights,
    c_kv: Float[Array, "batch seq kv_rank"],
    config: ModelConfig,
    recipe: FP8Config | None = None,
) -> tuple[Float[Array, "batch seq heads nope"], Float[Array, "batch seq heads v"]]:
    """(k_C, v) expanded from the latent (eqs 2 and 5)."""
    both = linear(c_kv, w["w_uk_uv"], recipe)
    k_c, v = jnp.split(both, [config.attention.qk_nope_head_dim], axis=-1)
    return k_c, v


def mla(
    w: MLAWeights,
    h: Float[Array, "batch seq d"],
    turn: Rotation,
    segment_ids: Int[Array, "batch seq"] | None,
    config: ModelConfig,
    recipe: FP8Config | None = None,
) -> Float[Array, "batch seq d"]:
    """u_t = W_O [o_1; ...; o_h] over a whole sequence (eqs 10 and 11), causal, in the dtype of h."""
    attention = config.attention
    with jax.named_scope("mla_project"):
        q = queries(w, h, turn, config, recipe)
        c_kv, k_r = latents(w, h, turn, config, recipe)
        k_c, v = keys_values(w, c_kv, config, recipe)
    scale = softmax_scale(config.rope, q.shape[-1])
    # eq 10: the key of head i is [k_C,i ; k_R] (eq 4)
    out = attend(q, k_c, v, k_r, segment_ids, scale, attention.implementation)
    heads = out.reshape(*out.shape[:2], -1)
    w_o = w["w_o"].reshape(-1, h.shape[-1])
    return linear(heads, w_o, recipe, after_attention=True)


class MLA(nn.Module):
    """Declares the parameters of `mla` and calls it."""

    config: ModelConfig
    recipe: FP8Config | None = None

    @nn.compact
    def __call__(self, h, turn, segment_ids):
        config, a = self.config, self.config.attention
        d, std = config.d_model, config.init_std
        compressed, query_in, query_axis = {}, d, "embed"
        if a.q_lora_rank:
            query_in, query_axis = a.q_lora_rank, "latent"
            compressed["w_dq"] = weight(self, "w_dq", (d, a.q_lora_rank), ("embed", "latent"), std)
            compressed["q_norm"] = RMSNorm(a.latent_norm_eps, name="q_norm").scale(a.q_lora_rank)
        q_shape = (query_in, a.n_heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
        kv_shape = (a.kv_lora_rank, a.n_heads, a.qk_nope_head_dim + a.v_head_dim)
        latent_shape = (d, a.kv_lora_rank + a.qk_rope_head_dim)
        w = MLAWeights(
            **compressed,
            w_uq_qr=weight(self, "w_uq_qr", q_shape, (query_axis, "heads", "head"), std),
            w_dkv_kr=weight(self, "w_dkv_kr", latent_shape, ("embed", "latent"), std),
            kv_norm=RMSNorm(a.latent_norm_eps, name="kv_norm").scale(a.kv_lora_rank),
            w_uk_uv=weight(self, "w_uk_uv", kv_shape, ("latent", "heads", "head"), std),
            w_o=weight(self, "w_o", (a.n_heads, a.v_head_dim, d), ("heads", "head", "embed"), std),
        )
        return mla(w, h, turn, segment_ids, config, self.recipe)

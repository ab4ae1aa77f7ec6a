"""What MLA replaces, behind the same interface: MHA, GQA (arXiv 2305.13245), MQA (arXiv 1911.02150)."""

from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsv3_jax.config import AttentionConfig, FP8Config, ModelConfig
from dsv3_jax.model.attend import attend
from dsv3_jax.model.layers import linear, weight
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.rope import Rotation, rotate, softmax_scale


def kv_heads(config: AttentionConfig) -> int:
    """Key/value heads of a baseline: one a query head (MHA), `n_kv_heads` (GQA), or one (MQA)."""
    return {"mha": config.n_heads, "gqa": config.n_kv_heads, "mqa": 1}[config.kind]


def rope_dim(config: AttentionConfig) -> int:
    """Width of the rotated part of a head: all of it in the baselines."""
    return config.qk_rope_head_dim if config.kind == "mla" else config.head_dim


def grouped_query_attention(
    w: dict[str, Array],
    h: Float[Array, "batch seq d"],
    turn: Rotation,
    segment_ids: Int[Array, "batch seq"] | None,
    config: ModelConfig,
    recipe: FP8Config | None = None,
) -> Float[Array, "batch seq d"]:
    """Causal attention in which `n_heads / kv_heads` query heads share a key and a value head."""
    q = linear(h, w["w_q"], recipe)
    k = linear(h, w["w_k"], recipe)
    v = linear(h, w["w_v"], recipe)
    out = attend(
        rotate(q, turn, config.rope.interleaved),
        rotate(k, turn, config.rope.interleaved),
        v,
        None,
        segment_ids,
        softmax_scale(config.rope, q.shape[-1]),
        config.attention.implementation,
    )
    heads = out.reshape(*out.shape[:2], -1)
    w_o = w["w_o"].reshape(-1, h.shape[-1])
    return linear(heads, w_o, recipe, after_attention=True)


class GroupedQueryAttention(nn.Module):
    """Declares the parameters of `grouped_query_attention` and calls it."""

    config: ModelConfig
    recipe: FP8Config | None = None

    @nn.compact
    def __call__(self, h, turn, segment_ids):
        a, d, std = self.config.attention, self.config.d_model, self.config.init_std
        axes = ("embed", "heads", "head")
        w = {
            "w_q": weight(self, "w_q", (d, a.n_heads, a.head_dim), axes, std),
            "w_k": weight(self, "w_k", (d, kv_heads(a), a.head_dim), axes, std),
            "w_v": weight(self, "w_v", (d, kv_heads(a), a.head_dim), axes, std),
            "w_o": weight(self, "w_o", (a.n_heads, a.head_dim, d), ("heads", "head", "embed"), std),
        }
        return grouped_query_attention(w, h, turn, segment_ids, self.config, self.recipe)


def attention_module(config: ModelConfig, name: str, recipe: FP8Config | None = None) -> nn.Module:
    """The attention of a block: `module(h, turn, segment_ids) -> u`, all [batch, seq, d]."""
    return (MLA if config.attention.kind == "mla" else GroupedQueryAttention)(config, recipe, name=name)

"""The whole model over one sequence, and its loss."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dsv3_jax.config import ModelConfig, RopeConfig
from tests.oracles.attention import Hidden, Ids, gqa, mla
from tests.oracles.ffn import rms_norm, swiglu
from tests.oracles.moe import Routing, moe
from tests.oracles.rope import Rope, make_rope
from tests.oracles.tree import Tree, float64


class Output(NamedTuple):
    logits: Float[np.ndarray, "seq vocab"]
    hidden: Hidden  # After the final norm: h^0 of multi-token prediction.
    last_layer: Hidden  # Before it.
    routing: list[Routing | None]  # One a layer, None where the layer is dense.


def rope_of(config: RopeConfig, dim: int) -> Rope:
    """`make_rope` from the configuration, whose YaRN fields carry a prefix."""
    return make_rope(dim, **{k.removeprefix("yarn_"): v for k, v in dataclasses.asdict(config).items()})


def attention(
    x: Hidden, p: Tree, config: ModelConfig, positions: Ids = None, segment_ids: Ids = None
) -> Hidden:
    """The attention that config.attention.kind names."""
    heads = config.attention
    if heads.kind == "mla":
        rope = rope_of(config.rope, heads.qk_rope_head_dim)
        return mla(x, p, rope, eps=heads.latent_norm_eps, positions=positions, segment_ids=segment_ids)
    return gqa(x, p, rope_of(config.rope, heads.head_dim), positions=positions, segment_ids=segment_ids)


def ffn(x: Hidden, p: Tree, config: ModelConfig) -> tuple[Hidden, Routing | None]:
    """Dense, or MoE if the parameters have a router."""
    if "w_router" not in p:
        return swiglu(x, p), None
    c = config.moe
    return moe(
        x,
        p,
        top_k=c.top_k,
        n_groups=c.n_groups,
        topk_groups=c.topk_groups,
        group_score=c.group_score,
        gate=c.gate,
        normalize=c.normalize_gates,
        scale=c.routed_scale,
    )


def layer(
    x: Hidden, p: Tree, config: ModelConfig, positions: Ids = None, segment_ids: Ids = None
) -> tuple[Hidden, Routing | None]:
    """Pre-norm block: u = x + Attention(RMSNorm(x)); h = u + FFN(RMSNorm(u)) (DeepSeek-V3 figure 2)."""
    x, p = float64(x), float64(p)
    x = x + attention(rms_norm(x, p["attn_norm"], config.norm_eps), p["attn"], config, positions, segment_ids)
    out, routing = ffn(rms_norm(x, p["ffn_norm"], config.norm_eps), p["ffn"], config)
    return x + out, routing


def head(params: Tree, hidden: Hidden) -> Float[np.ndarray, "seq vocab"]:
    """Logits; the transposed embedding is the head when there is none."""
    return float64(hidden) @ float64(params["head"] if "head" in params else np.transpose(params["embed"]))


def forward(
    params: Tree,
    tokens: Int[np.ndarray, "seq"],
    config: ModelConfig,
    *,
    positions: Ids = None,
    segment_ids: Ids = None,
) -> Output:
    """Embedding, the layers (dense ones first), final norm, head. Positions are 0, 1, ... when None."""
    dense = ["w_router" not in p["ffn"] for p in params["layers"]]
    expected = [n < config.moe.n_dense_layers for n in range(config.n_layers)]
    if dense != expected:
        raise ValueError(f"dense layers are {dense}, config.moe.n_dense_layers says {expected}: fix either")
    params = float64(params)
    x = params["embed"][np.asarray(tokens)]
    routing = []
    for p in params["layers"]:
        x, where = layer(x, p, config, positions, segment_ids)
        routing.append(where)
    hidden = rms_norm(x, params["final_norm"], config.norm_eps)
    return Output(head(params, hidden), hidden, x, routing)


def cross_entropy(
    logits: Float[np.ndarray, "n vocab"],
    targets: Int[np.ndarray, "n"],
    valid: Bool[np.ndarray, "n"] | None = None,
) -> float:
    """Mean of -log softmax(logits)[target], in nats, over the valid targets; 0 if there are none."""
    logits = float64(logits)
    losses = []
    for i in range(len(targets)):
        if valid is None or valid[i]:
            top = np.max(logits[i])
            losses.append(top + np.log(np.sum(np.exp(logits[i] - top))) - logits[i, targets[i]])
    return float(np.mean(losses)) if losses else 0.0

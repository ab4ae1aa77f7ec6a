"""FLOPs of training on a token: what the model needs, and what the devices compute.

The model's count is that of `training.throughput`, the one behind every MFU: 6 an active parameter, and
causal attention. Devices compute more: what the remat policy computes again, and the scores that an attention
kernel's backward pass needs a second time. A multiplication and an addition are two.
"""

from typing import Any, NamedTuple

from dsv3_jax.config import AttentionConfig, Config, ModelConfig
from dsv3_jax.training.throughput import flops_per_token


class Forward(NamedTuple):
    """FLOPs a token of a forward pass, by what recomputation and precision treat alike."""

    up_projections: float  # From the latents to heads (MLA), or queries, keys and values.
    linear: float  # All other linear layers but those below.
    ffn_down: float  # The last product of dense and shared feed-forward networks.
    merge: float  # Of MTP's two inputs.
    expert_up: float  # Of the routed experts: gate and up.
    expert_down: float
    router: float  # Float32.
    attention: float  # Scores and values, half of the square: causal.
    head: float

    @property
    def blocks_but_last(self) -> float:
        """What is inside the layers, without the products that only the next layer reads."""
        return sum(self) - self.head - self.merge - self.ffn_down - self.expert_down


class Flops(NamedTuple):
    """FLOPs a token of a whole training step."""

    model: float
    hardware: float
    fp8: float  # Part of `hardware` that runs in FP8 when `train.precision` is "fp8".


def widths(a: AttentionConfig) -> tuple[int, int]:
    """(of query and key heads, of value heads)."""
    if a.kind == "mla":
        return a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
    return a.head_dim, a.head_dim


def layers(config: ModelConfig) -> tuple[int, int]:
    """(dense layers, MoE layers), prediction depths counted."""
    dense = min(config.moe.n_dense_layers, config.n_layers)
    moe = config.n_layers - dense
    return (dense, moe + config.mtp.depth) if moe else (dense + config.mtp.depth, 0)


def forward(config: ModelConfig, seq_len: int) -> Forward:
    """FLOPs a token of a forward pass over sequences of `seq_len`."""
    a, moe, d = config.attention, config.moe, config.d_model
    dense, sparse = layers(config)
    qk, v = widths(a)
    if a.kind == "mla":
        up = (a.q_lora_rank or d) * a.n_heads * qk + a.kv_lora_rank * a.n_heads * (a.qk_nope_head_dim + v)
        down = d * a.q_lora_rank + d * (a.kv_lora_rank + a.qk_rope_head_dim)
    else:
        kv_heads = {"mha": a.n_heads, "gqa": a.n_kv_heads, "mqa": 1}[a.kind]
        up, down = d * (a.n_heads * qk + kv_heads * (qk + v)), 0
    merge = config.mtp.depth * 2 * d * d if config.mtp.kind == "sequential" else 0
    ffn = d * (dense * config.d_ff + sparse * moe.n_shared * moe.d_ff_expert)
    linear = (dense + sparse) * (down + a.n_heads * v * d) + 2 * ffn
    expert = sparse * moe.top_k * d * moe.d_ff_expert
    return Forward(
        up_projections=2.0 * (dense + sparse) * up,
        linear=2.0 * linear,
        ffn_down=2.0 * ffn,
        merge=2.0 * merge,
        expert_up=4.0 * expert,
        expert_down=2.0 * expert,
        router=2.0 * sparse * d * moe.n_experts,
        attention=1.0 * (dense + sparse) * seq_len * a.n_heads * (qk + v),
        head=2.0 * (1 + config.mtp.depth) * d * config.vocab_size,
    )


def recomputed(once: Forward, remat: str) -> float:
    """FLOPs a token that the backward pass computes again under a policy (`model.transformer.REMAT`)."""
    if remat == "full":
        return once.blocks_but_last
    if remat == "v3":
        return once.up_projections + once.router
    if remat == "dots":  # Kernels are no dots.
        return once.attention + once.expert_up
    return 0.0


def attention_backward(config: ModelConfig, once: Forward, platform: str) -> float:
    """What attention's backward kernels compute beyond twice the forward pass.

    Scores again (FlashAttention-2, arXiv 2307.08691): 3 products of the width of keys and 2 of values. On TPU
    two kernels do so, one for the queries' gradients and one for the rest: 4 and 3.
    """
    qk, v = widths(config.attention)
    products = (4 * qk + 3 * v) if platform == "tpu" else (3 * qk + 2 * v)
    return once.attention * (products / (qk + v) - 2)


def of_training(config: Config, params: Any, platform: str) -> Flops:
    """FLOPs a token of training.

    Args:
      config: of the run.
      params: the parameters' shapes.
      platform: "gpu" or "tpu": whose attention kernels.
    """
    once = forward(config.model, config.train.seq_len)
    again = recomputed(once, config.train.remat)
    hardware = 3 * sum(once) + again + attention_backward(config.model, once, platform)
    linear = sum(once) - once.router - once.attention - once.head
    fp8 = 3 * linear if config.train.precision == "fp8" else 0.0
    return Flops(flops_per_token(config, params), hardware, fp8)

"""Hugging Face models of a given shape, and their parameters in the layout of the oracles."""

import numpy as np

from dsv3_jax.config import ModelConfig, RopeConfig
from tests.oracles.tree import Tree

State = dict[str, np.ndarray]


def rope_parameters(c: RopeConfig) -> dict:
    """The `rope_parameters` of a transformers configuration."""
    if c.yarn_factor == 1:
        return {"rope_type": "default", "rope_theta": c.theta}
    return {
        "rope_type": "yarn",
        "rope_theta": c.theta,
        "factor": c.yarn_factor,
        "original_max_position_embeddings": c.yarn_original_len,
        "beta_fast": c.yarn_beta_fast,
        "beta_slow": c.yarn_beta_slow,
        "mscale": c.yarn_mscale,
        "mscale_all_dim": c.yarn_mscale_all_dim,
    }


def model_like(c: ModelConfig):
    """The transformers model of the same shape: Llama for the baselines, else V2 or V3 by the gate."""
    import transformers  # Here, so that the layout is usable where only the numbers are at hand.

    shape = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.attention.n_heads,
        "tie_word_embeddings": c.tie_embeddings,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": rope_parameters(c.rope),
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    a, m = c.attention, c.moe
    if a.kind != "mla":
        # Llama has no factor on the softmax scale: YaRN as published puts all of mscale(s, 1) on cos and sin.
        shape["rope_parameters"] = {
            k: v for k, v in rope_parameters(c.rope).items() if not k.startswith("mscale")
        }
        kv_heads = {"mha": a.n_heads, "gqa": a.n_kv_heads, "mqa": 1}[a.kind]
        config = transformers.LlamaConfig(**shape, num_key_value_heads=kv_heads, head_dim=a.head_dim)
        return transformers.LlamaForCausalLM(config).eval()
    shape |= {
        "num_key_value_heads": a.n_heads,
        "q_lora_rank": a.q_lora_rank or None,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "moe_intermediate_size": m.d_ff_expert,
        "n_routed_experts": m.n_experts,
        "n_shared_experts": m.n_shared,
        "num_experts_per_tok": m.top_k,
        "first_k_dense_replace": m.n_dense_layers,
        "norm_topk_prob": m.normalize_gates,
        "routed_scaling_factor": m.routed_scale,
        "n_group": m.n_groups,
        "topk_group": m.topk_groups,
        "experts_implementation": "eager",
    }
    if m.gate == "softmax":
        method = "group_limited_greedy" if m.n_groups > 1 else "greedy"
        return transformers.DeepseekV2ForCausalLM(
            transformers.DeepseekV2Config(**shape, topk_method=method)
        ).eval()
    config = transformers.DeepseekV3Config(**shape, rope_interleave=c.rope.interleaved)
    return transformers.DeepseekV3ForCausalLM(config).eval()


def state_of(module) -> State:
    """A copy of the parameters and saved buffers of a torch module."""
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def attn_params(s: State, prefix: str, c: ModelConfig) -> Tree:
    a = c.attention

    def heads(name: str, width: int) -> np.ndarray:  # [heads * width, in] -> [in, heads, width]
        w = s[f"{prefix}.{name}.weight"]
        return w.reshape(-1, width, w.shape[1]).transpose(2, 0, 1)

    p = {"w_o": s[f"{prefix}.o_proj.weight"].T.reshape(a.n_heads, -1, c.d_model)}
    if a.kind != "mla":
        return p | {f"w_{name}": heads(f"{name}_proj", a.head_dim) for name in "qkv"}
    nope, rank = a.qk_nope_head_dim, a.kv_lora_rank
    down, up = s[f"{prefix}.kv_a_proj_with_mqa.weight"].T, heads("kv_b_proj", nope + a.v_head_dim)
    p |= {"w_dkv": down[:, :rank], "w_kr": down[:, rank:], "kv_norm": s[f"{prefix}.kv_a_layernorm.weight"]}
    p |= {"w_uk": up[:, :, :nope], "w_uv": up[:, :, nope:]}
    query = heads("q_b_proj" if a.q_lora_rank else "q_proj", nope + a.qk_rope_head_dim)
    p["w_qr"] = query[:, :, nope:]
    if not a.q_lora_rank:
        return p | {"w_q": query[:, :, :nope]}
    w_dq, q_norm = s[f"{prefix}.q_a_proj.weight"].T, s[f"{prefix}.q_a_layernorm.weight"]
    return p | {"w_uq": query[:, :, :nope], "w_dq": w_dq, "q_norm": q_norm}


def dense_params(s: State, prefix: str) -> Tree:
    return {f"w_{name}": s[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up", "down")}


def ffn_params(s: State, prefix: str) -> Tree:
    if f"{prefix}.gate.weight" not in s:
        return dense_params(s, prefix)
    p = {"w_router": s[f"{prefix}.gate.weight"].T, "shared": [dense_params(s, f"{prefix}.shared_experts")]}
    if f"{prefix}.gate.e_score_correction_bias" in s:
        p["bias"] = s[f"{prefix}.gate.e_score_correction_bias"]
    p["experts"] = []
    for joined, down in zip(
        s[f"{prefix}.experts.gate_up_proj"], s[f"{prefix}.experts.down_proj"], strict=True
    ):
        gate, up = np.split(joined, 2)
        p["experts"].append({"w_gate": gate.T, "w_up": up.T, "w_down": down.T})
    return p


def layer_params(s: State, prefix: str, c: ModelConfig) -> Tree:
    """Oracle parameters of one decoder layer."""
    return {
        "attn_norm": s[f"{prefix}.input_layernorm.weight"],
        "attn": attn_params(s, f"{prefix}.self_attn", c),
        "ffn_norm": s[f"{prefix}.post_attention_layernorm.weight"],
        "ffn": ffn_params(s, f"{prefix}.mlp"),
    }


def model_params(s: State, c: ModelConfig) -> Tree:
    """Oracle parameters of the whole model: a linear map of the state dict."""
    params = {"embed": s["model.embed_tokens.weight"], "final_norm": s["model.norm.weight"]}
    if not c.tie_embeddings:
        params["head"] = s["lm_head.weight"].T
    return params | {"layers": [layer_params(s, f"model.layers.{n}", c) for n in range(c.n_layers)]}

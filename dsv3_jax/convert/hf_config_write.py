"""`ModelConfig` to config.json of Hugging Face, for current transformers and for DeepSeek's code."""

from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.convert.fp8 import BLOCK
from dsv3_jax.convert.hf_config import IMPLIED, MLA_FIELDS, YARN

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
}


def to_hf(config: ModelConfig, *, fp8: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """A config.json for the model, as current transformers and DeepSeek's code both read it.

    Raises:
      ValueError: `args[0]` lists every property that no Hugging Face class expresses.
    """
    a, moe, mtp = config.attention, config.moe, config.mtp
    problems = []
    is_moe = moe.n_dense_layers < config.n_layers
    if a.kind != "mla":
        model_type = "deepseek" if is_moe else "llama"
    else:
        model_type = "deepseek_v2" if is_moe and moe.gate == "softmax" else "deepseek_v3"
    tree: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": {"gqa": a.n_kv_heads, "mqa": 1}.get(a.kind, a.n_heads),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "torch_dtype": dtype,
        **_rope_to_hf(config, problems),
    }
    if a.kind == "mla":
        tree |= {name: getattr(a, name) for name in MLA_FIELDS} | {"q_lora_rank": a.q_lora_rank or None}
        if a.latent_norm_eps != 1e-6:
            problems.append(f"model.attention.latent_norm_eps = {a.latent_norm_eps}: the classes have 1e-6")
    else:
        tree["head_dim"] = a.head_dim
    if model_type != "llama":
        tree |= _moe_to_hf(config, model_type, problems)
    if mtp.depth and (model_type != "deepseek_v3" or mtp.kind != "sequential"):
        problems.append(f"model.mtp = {mtp.depth} {mtp.kind}: only MLA with a sigmoid gate has such layers")
    if model_type == "deepseek_v3":
        tree["num_nextn_predict_layers"] = mtp.depth
        tree["rope_interleave"] = config.rope.interleaved
    elif config.rope.interleaved != IMPLIED[model_type]["rope_interleave"]:
        problems.append(
            f"model.rope.interleaved = {config.rope.interleaved}: {model_type} has the other order"
        )
    if fp8:
        quantised = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        tree["quantization_config"] = quantised | {"weight_block_size": [BLOCK, BLOCK]}
    if problems:
        raise ValueError(problems)
    return tree


def _moe_to_hf(config: ModelConfig, model_type: str, problems: list[str]) -> dict[str, Any]:
    m = config.moe
    dense = m.n_dense_layers >= config.n_layers
    sigmoid = m.gate == "sigmoid"
    limited = m.n_groups > m.topk_groups
    scale = m.routed_scale
    if not dense and model_type != "deepseek_v3" and m.normalize_gates and scale != 1:
        problems.append(f"model.moe.routed_scale = {scale}: {model_type} does not scale normalised gates")
    if not dense and model_type == "deepseek" and (limited or scale != 1 or sigmoid):
        problems.append(
            "model.moe: with this attention only ungrouped softmax gates of scale 1 are expressible"
        )
    if not dense and limited and m.group_score != ("top2_sum" if sigmoid else "max"):
        problems.append(f"model.moe.group_score = {m.group_score}: {model_type} scores groups otherwise")
    method = "noaux_tc" if model_type == "deepseek_v3" else "group_limited_greedy" if limited else "greedy"
    return {
        "first_k_dense_replace": min(m.n_dense_layers, config.n_layers),
        "moe_layer_freq": 1,
        "n_routed_experts": m.n_experts,
        "n_shared_experts": m.n_shared,
        "num_experts_per_tok": m.top_k,
        "moe_intermediate_size": m.d_ff_expert,
        "n_group": m.n_groups if limited else 1,
        "topk_group": m.topk_groups if limited else 1,
        "scoring_func": "sigmoid" if model_type == "deepseek_v3" else "softmax",
        "topk_method": method,
        "norm_topk_prob": m.normalize_gates,
        "routed_scaling_factor": scale,
    }


def _rope_to_hf(config: ModelConfig, problems: list[str]) -> dict[str, Any]:
    rope = config.rope
    if rope.yarn_factor == 1:
        return {"rope_theta": rope.theta}
    values: dict[str, Any] = {name: getattr(rope, ours) for name, ours in YARN.items()}
    if config.attention.kind != "mla":
        # A whole rotated head feels only mscale, squared; the classes know the value 1 alone.
        if rope.yarn_mscale != 1:
            problems.append(f"model.rope.yarn_mscale = {rope.yarn_mscale}: without MLA only 1 is expressible")
        del values["mscale"], values["mscale_all_dim"]
    return {"rope_theta": rope.theta, "rope_scaling": {"type": "yarn", "rope_type": "yarn"} | values}

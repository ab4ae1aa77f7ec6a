"""The DeepSeek-V3 of Hugging Face transformers in the shape of ours: the rival of several benchmarks."""

from typing import Any

import jax
import numpy as np
import torch
import transformers

from dsv3_jax.config import Config, ModelConfig


def deepseek_config(model: ModelConfig, **others: Any) -> Any:
    """The configuration of the same model in transformers; `others` are fields of it."""
    a, moe = model.attention, model.moe
    return transformers.DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.n_layers,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_heads,
        q_lora_rank=a.q_lora_rank or None,
        kv_lora_rank=a.kv_lora_rank,
        qk_nope_head_dim=a.qk_nope_head_dim,
        qk_rope_head_dim=a.qk_rope_head_dim,
        v_head_dim=a.v_head_dim,
        moe_intermediate_size=moe.d_ff_expert,
        n_routed_experts=moe.n_experts,
        n_shared_experts=moe.n_shared,
        num_experts_per_tok=moe.top_k,
        first_k_dense_replace=moe.n_dense_layers,
        norm_topk_prob=moe.normalize_gates,
        routed_scaling_factor=moe.routed_scale,
        n_group=moe.n_groups,
        topk_group=moe.topk_groups,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope.theta},
        rope_interleave=model.rope.interleaved,
        max_position_embeddings=model.max_seq_len,
        **others,
    )


def to_transformers(params: Any, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our parameters under the names and in the layouts of transformers' DeepseekV3ForCausalLM."""
    out: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": np.asarray(params["head"]).T,
    }
    stacks = ("dense_layers", "moe_layers")
    layers = [
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], params[stack])
        for stack in stacks
        if stack in params
        for i in range(params[stack]["attention_norm"]["scale"].shape[0])
    ]
    for number, layer in enumerate(layers):
        at, a = f"model.layers.{number}", layer["attention"]
        out[f"{at}.input_layernorm.weight"] = layer["attention_norm"]["scale"]
        out[f"{at}.post_attention_layernorm.weight"] = layer["ffn_norm"]["scale"]
        out[f"{at}.self_attn.q_a_proj.weight"] = a["w_dq"].T
        out[f"{at}.self_attn.q_a_layernorm.weight"] = a["q_norm"]["scale"]
        out[f"{at}.self_attn.q_b_proj.weight"] = a["w_uq_qr"].reshape(a["w_uq_qr"].shape[0], -1).T
        out[f"{at}.self_attn.kv_a_proj_with_mqa.weight"] = a["w_dkv_kr"].T
        out[f"{at}.self_attn.kv_a_layernorm.weight"] = a["kv_norm"]["scale"]
        out[f"{at}.self_attn.kv_b_proj.weight"] = a["w_uk_uv"].reshape(config.attention.kv_lora_rank, -1).T
        out[f"{at}.self_attn.o_proj.weight"] = a["w_o"].reshape(-1, config.d_model).T
        if "ffn" in layer:
            out |= _swiglu(f"{at}.mlp", layer["ffn"])
            continue
        moe = layer["moe"]
        out[f"{at}.mlp.gate.weight"] = moe["centroids"].T
        out[f"{at}.mlp.experts.gate_up_proj"] = moe["gate_up"].swapaxes(1, 2)
        out[f"{at}.mlp.experts.down_proj"] = moe["down"].swapaxes(1, 2)
        out |= _swiglu(f"{at}.mlp.shared_experts", moe["shared"])
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in out.items()}


def _swiglu(at: str, ffn: Any) -> dict[str, np.ndarray]:
    gate, up = np.split(ffn["gate_up"], 2, axis=-1)
    weights = {"gate_proj": gate.T, "up_proj": up.T, "down_proj": ffn["down"].T}
    return {f"{at}.{name}.weight": value for name, value in weights.items()}


class Peer:
    """transformers' training step on the same parameters and tokens: `step()` returns (loss, norm)."""

    def __init__(
        self,
        config: Config,
        params: Any,
        batch: dict[str, np.ndarray],
        experts: str = "grouped_mm",
        attention: str = "sdpa",
        compiled: bool = False,
    ):
        m, o = config.model, config.optimizer
        shape = deepseek_config(
            m, use_cache=False, attn_implementation=attention, experts_implementation=experts
        )
        self.model = transformers.DeepseekV3ForCausalLM(shape)
        missing, unexpected = self.model.load_state_dict(to_transformers(params, m), strict=False)
        missing = [name for name in missing if not name.endswith("e_score_correction_bias")]
        if missing or unexpected:
            raise RuntimeError(f"parameters do not match: missing {missing}, unexpected {unexpected}")
        self.model.train()
        self.tokens, self.targets = (
            torch.from_numpy(batch[name][0]).long() for name in ("tokens", "targets")
        )
        # Norms do not decay, as in ours. The fused AdamW is torch's fastest on CPU.
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if "norm" not in n], "weight_decay": o.weight_decay},
            {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=o.peak_lr, betas=(o.b1, o.b2), eps=o.eps, fused=True)
        self.clip_norm = o.clip_norm
        self._loss = torch.compile(self._forward) if compiled else self._forward

    def _forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def step(self) -> tuple[float, float]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.tokens, self.targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        return loss.item(), norm.item()

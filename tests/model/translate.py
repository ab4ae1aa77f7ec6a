"""The model's parameters in the layout of `tests.oracles`. Linear, so gradients translate the same way."""

from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig


def to_oracle(params: Any, router: Any, config: ModelConfig) -> Any:
    """Numpy arrays named and shaped as `tests.oracles` says."""
    tree = {
        "embed": np.asarray(params["embedding"]),
        "final_norm": np.asarray(params["final_norm"]["scale"]),
        "layers": [],
        "mtp": [],
    }
    if not config.tie_embeddings:
        tree["head"] = np.asarray(params["head"])
    for stack in ("dense_layers", "moe_layers"):
        if stack in params:
            depth = np.asarray(params[stack]["attention_norm"]["scale"]).shape[0]
            for i in range(depth):
                biases = None
                if stack == "moe_layers":
                    biases = None if router is None else np.asarray(router[stack]["moe"]["bias"])[i]
                tree["layers"].append(_layer(_index(params[stack], i), biases, config))
    for k in range(1, config.mtp.depth + 1):
        part = params[f"mtp_{k}"]
        bias = None
        if router is not None and f"mtp_{k}" in router:
            bias = np.asarray(router[f"mtp_{k}"]["block"]["moe"]["bias"])
        depth = {"block": _layer(part["block"], bias, config), "norm": np.asarray(part["norm"]["scale"])}
        if "merge" in part:
            depth |= {
                "eh_proj": np.asarray(part["merge"]),
                "enorm": np.asarray(part["embedding_norm"]["scale"]),
                "hnorm": np.asarray(part["hidden_norm"]["scale"]),
            }
        tree["mtp"].append(depth)
    return tree


def _index(tree: Any, i: int) -> Any:
    if isinstance(tree, dict):
        return {name: _index(leaf, i) for name, leaf in tree.items()}
    return np.asarray(tree)[i]


def _layer(p: Any, bias: Any, config: ModelConfig) -> Any:
    return {
        "attn_norm": np.asarray(p["attention_norm"]["scale"]),
        "attn": attention_to_oracle(p["attention"], config),
        "ffn_norm": np.asarray(p["ffn_norm"]["scale"]),
        "ffn": _moe(p["moe"], bias) if "moe" in p else _dense(p["ffn"]),
    }


def attention_to_oracle(p: Any, config: ModelConfig) -> Any:
    """The parameters of one attention module."""
    a = config.attention
    p = {name: np.asarray(leaf["scale"] if isinstance(leaf, dict) else leaf) for name, leaf in p.items()}
    if a.kind != "mla":
        return p
    nope = a.qk_nope_head_dim
    out = {
        "w_dkv": p["w_dkv_kr"][:, : a.kv_lora_rank],
        "w_kr": p["w_dkv_kr"][:, a.kv_lora_rank :],
        "kv_norm": p["kv_norm"],
        "w_uk": p["w_uk_uv"][..., :nope],
        "w_uv": p["w_uk_uv"][..., nope:],
        "w_qr": p["w_uq_qr"][..., nope:],
        "w_o": p["w_o"],
    }
    if "w_dq" in p:
        return out | {"w_dq": p["w_dq"], "q_norm": p["q_norm"], "w_uq": p["w_uq_qr"][..., :nope]}
    return out | {"w_q": p["w_uq_qr"][..., :nope]}


def _dense(p: Any) -> Any:
    gate, up = np.split(np.asarray(p["gate_up"]), 2, axis=-1)
    return {"w_gate": gate, "w_up": up, "w_down": np.asarray(p["down"])}


def _moe(p: Any, bias: Any) -> Any:
    gate_up, down = np.asarray(p["gate_up"]), np.asarray(p["down"])
    out = {
        "w_router": np.asarray(p["centroids"]),
        "experts": [_dense({"gate_up": g, "down": d}) for g, d in zip(gate_up, down, strict=True)],
        "shared": [_dense(p["shared"])] if "shared" in p else [],
    }
    return out if bias is None else out | {"bias": bias}

"""The shape of every variable of a model, from its configuration alone.

The model's modules declare the same shapes; asking them means to import JAX and to trace the model, which
takes longer than converting a few gigabytes. A test compares the two.
"""

import functools

from dsv3_jax.config import ModelConfig

Path = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]


@functools.lru_cache(maxsize=64)
def shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """{(collection, module, ..., name): shape}; layers, and experts behind them, are stacked."""
    d, v = config.d_model, config.vocab_size
    dense = min(config.moe.n_dense_layers, config.n_layers)
    sparse = config.n_layers - dense
    found: Shapes = {"embedding": (v, d), "final_norm/scale": (d,)}
    if not config.tie_embeddings:
        found["head"] = (d, v)
    if dense:
        found |= _stacked("dense_layers", dense, _block(config, moe=False))
    if sparse:
        found |= _stacked("moe_layers", sparse, _block(config, moe=True))
    for depth in range(1, config.mtp.depth + 1):
        found[f"mtp_{depth}/norm/scale"] = (d,)
        if config.mtp.kind == "sequential":
            found[f"mtp_{depth}/embedding_norm/scale"] = found[f"mtp_{depth}/hidden_norm/scale"] = (d,)
            found[f"mtp_{depth}/merge"] = (2 * d, d)
        block = _block(config, moe=sparse > 0)
        found |= {f"mtp_{depth}/block/{name}": shape for name, shape in block.items()}
    return {(_collection(name), *name.split("/")): shape for name, shape in found.items()}


def _collection(name: str) -> str:
    return "router" if name.endswith("moe/bias") else "params"


def _stacked(stack: str, layers: int, block: Shapes) -> Shapes:
    return {f"{stack}/{name}": (layers, *shape) for name, shape in block.items()}


def _block(config: ModelConfig, moe: bool) -> Shapes:
    d, m = config.d_model, config.moe
    found: Shapes = {"attention_norm/scale": (d,), "ffn_norm/scale": (d,)}
    found |= {f"attention/{name}": shape for name, shape in _attention(config).items()}
    if not moe:
        return found | {"ffn/gate_up": (d, 2 * config.d_ff), "ffn/down": (config.d_ff, d)}
    found |= {
        "moe/centroids": (d, m.n_experts),
        "moe/bias": (m.n_experts,),
        "moe/gate_up": (m.n_experts, d, 2 * m.d_ff_expert),
        "moe/down": (m.n_experts, m.d_ff_expert, d),
    }
    if m.n_shared:
        width = m.n_shared * m.d_ff_expert
        found |= {"moe/shared/gate_up": (d, 2 * width), "moe/shared/down": (width, d)}
    return found


def _attention(config: ModelConfig) -> Shapes:
    d, a = config.d_model, config.attention
    h = a.n_heads
    if a.kind != "mla":
        kv_heads = {"gqa": a.n_kv_heads, "mqa": 1}.get(a.kind, h)
        keys = (d, kv_heads, a.head_dim)
        return {"w_q": (d, h, a.head_dim), "w_k": keys, "w_v": keys, "w_o": (h, a.head_dim, d)}
    found: Shapes = {
        "w_uq_qr": (a.q_lora_rank or d, h, a.qk_nope_head_dim + a.qk_rope_head_dim),
        "w_dkv_kr": (d, a.kv_lora_rank + a.qk_rope_head_dim),
        "kv_norm/scale": (a.kv_lora_rank,),
        "w_uk_uv": (a.kv_lora_rank, h, a.qk_nope_head_dim + a.v_head_dim),
        "w_o": (h, a.v_head_dim, d),
    }
    if a.q_lora_rank:
        found |= {"w_dq": (d, a.q_lora_rank), "q_norm/scale": (a.q_lora_rank,)}
    return found

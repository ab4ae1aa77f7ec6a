"""Hugging Face folders made with numpy and the safetensors format alone, by the names of the releases."""

import json
import struct

import ml_dtypes
import numpy as np

from dsv3_jax.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from dsv3_jax.convert import opened

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int64": "I64"}
# DeepSeek-V3 small: one dense layer, two of 4 experts in 2 groups, one prediction layer, YaRN.
HF = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "torch_dtype": "bfloat16",
}
CONFIG = ModelConfig(
    vocab_size=24,
    d_model=16,
    n_layers=3,
    d_ff=20,
    max_seq_len=64,
    init_std=0.02,
    attention=AttentionConfig(
        n_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    ),
    rope=RopeConfig(yarn_factor=4.0, yarn_original_len=16),
    moe=MoEConfig(
        n_experts=4, n_shared=1, top_k=2, d_ff_expert=8, n_groups=2, topk_groups=1, routed_scale=2.5
    ),
    mtp=MTPConfig(depth=1),
)


def shapes(hf):
    """{name: shape} of a release with DeepSeek-V3's names, from its config.json, written out by hand."""
    d, h = hf["hidden_size"], hf["num_attention_heads"]
    nope, rope, v = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    q, kv, f = hf["q_lora_rank"], hf["kv_lora_rank"], hf["moe_intermediate_size"]
    found = {"model.embed_tokens.weight": (hf["vocab_size"], d)}
    for layer in range(hf["num_hidden_layers"] + hf["num_nextn_predict_layers"]):
        p = f"model.layers.{layer}."
        found |= {
            p + "self_attn.q_a_proj.weight": (q, d),
            p + "self_attn.q_a_layernorm.weight": (q,),
            p + "self_attn.q_b_proj.weight": (h * (nope + rope), q),
            p + "self_attn.kv_a_proj_with_mqa.weight": (kv + rope, d),
            p + "self_attn.kv_a_layernorm.weight": (kv,),
            p + "self_attn.kv_b_proj.weight": (h * (nope + v), kv),
            p + "self_attn.o_proj.weight": (d, h * v),
            p + "input_layernorm.weight": (d,),
            p + "post_attention_layernorm.weight": (d,),
        }
        dense = layer < hf["first_k_dense_replace"]
        wide = (
            {"mlp.": hf["intermediate_size"]}
            if dense
            else {"mlp.shared_experts.": f * hf["n_shared_experts"]}
        )
        if not dense:
            wide |= {f"mlp.experts.{e}.": f for e in range(hf["n_routed_experts"])}
            found[p + "mlp.gate.weight"] = (hf["n_routed_experts"], d)
            found[p + "mlp.gate.e_score_correction_bias"] = (hf["n_routed_experts"],)
        for part, width in wide.items():
            found[f"{p}{part}gate_proj.weight"] = found[f"{p}{part}up_proj.weight"] = (width, d)
            found[f"{p}{part}down_proj.weight"] = (d, width)
        if layer >= hf["num_hidden_layers"]:
            found |= {p + "enorm.weight": (d,), p + "hnorm.weight": (d,), p + "eh_proj.weight": (d, 2 * d)}
            found |= {p + "shared_head.norm.weight": (d,)}
            found |= {
                p + name: (hf["vocab_size"], d) for name in ("embed_tokens.weight", "shared_head.head.weight")
            }
    return found | {"model.norm.weight": (d,), "lm_head.weight": (hf["vocab_size"], d)}


def random_tensors(hf=HF, dtype=BF16, seed=0):
    """{name: array}; the router bias float32, the prediction layer's copies equal to what they repeat."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes(hf).items():
        if "bias" in name:
            found[name] = rng.uniform(-0.3, 0.3, shape).astype(np.float32)
        elif "norm" in name:
            found[name] = rng.uniform(0.5, 1.5, shape).astype(dtype)
        else:
            found[name] = (rng.normal(size=shape) * max(1, shape[-1]) ** -0.5).astype(dtype)
    depth = f"model.layers.{hf['num_hidden_layers']}."
    if hf["num_nextn_predict_layers"]:
        found[depth + "embed_tokens.weight"] = found["model.embed_tokens.weight"]
        found[depth + "shared_head.head.weight"] = found["lm_head.weight"]
    return found


def encode(tensors, metadata=None):
    """The bytes of a safetensors file."""
    header, data, end = {"__metadata__": metadata or {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [end, end + len(raw)]
        header[name] = {"dtype": NAMES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        data.append(raw)
        end += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def write(path, hf=HF, tensors=None, shards=3):
    """A folder with so many files and an index, or one file without."""
    tensors = random_tensors(hf) if tensors is None else tensors
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf))
    names = list(tensors)
    if shards == 1:
        (path / "model.safetensors").write_bytes(encode(tensors))
        return path
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        (path / file).write_bytes(encode(part))
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def read(path):
    """{name: (dtype, shape, bytes)} of all safetensors files of a folder, read by hand."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[start:stop])
    return found


def everything(source):
    """The bytes of all arrays."""
    whole = {}
    for path, leaf in source.leaves.items():
        lead = leaf.shape[: leaf.lead]
        whole[path] = b"".join(source.read(path, at, 0, leaf.block[0]).tobytes() for at in np.ndindex(*lead))
    return whole


def equal(a, b):
    with opened.open_source(a) as first, opened.open_source(b) as second:
        return everything(first.source) == everything(second.source)

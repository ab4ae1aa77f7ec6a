"""config.json of Hugging Face to `ModelConfig` and back, by named properties.

The meaning of a field is that of DeepSeek's released code. `model_type` names a class; all that it decides
here is what its configurations leave unsaid (`IMPLIED`).
"""

from typing import Any, NamedTuple

from dsv3_jax.config import AttentionConfig, Config, ModelConfig, MoEConfig, MTPConfig, RopeConfig
from dsv3_jax.config_checks import check
from dsv3_jax.convert.fp8 import BLOCK

MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERT_FIELDS = (
    "first_k_dense_replace",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "topk_group",
)
_V3 = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": True,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 0,
}
# What each class takes for a field that its configuration does not have.
IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "rope_interleave": True,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
    },
    "deepseek": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "rope_interleave": False,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
    },
    "llama": {"rope_interleave": False, "first_k_dense_replace": None},
}
# Fields that only one value of is supported; None and an absent field are that value.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}
# Fields without a meaning for the logits: kept for the way back, and named in the report.
UNUSED = frozenset(
    "_name_or_path architectures attention_dropout auto_map aux_loss_alpha bos_token_id dtype eos_token_id "
    "ep_size id2label is_encoder_decoder label2id keys_to_ignore_at_inference "
    "output_attentions output_hidden_states output_router_logits pad_token_id "
    "problem_type return_dict seq_aux torch_dtype transformers_version use_cache chunk_size_feed_forward "
    "unsloth_version tokenizer_class num_labels qk_head_dim".split()
)
YARN = {
    "factor": "yarn_factor",
    "original_max_position_embeddings": "yarn_original_len",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}


class Imported(NamedTuple):
    """What a config.json says.

    Attributes:
      config: the model.
      fp8: whether matrices may be E4M3 with block scales.
      notes: fields that are unknown here, one line each.
      unused: fields that are known and have no part in the logits: token ids, dropout, file versions.
    """

    config: ModelConfig
    fp8: bool
    notes: list[str]
    unused: list[str]


class _Fields:
    """Reads named fields of a JSON object once, with their types; collects what is wrong."""

    def __init__(self, tree: dict[str, Any], implied: dict[str, Any], where: str = ""):
        self.tree, self.implied, self.where = tree, implied, where
        self.read: set[str] = set()
        self.problems: list[str] = []

    def get(self, name: str, kind: type, default: Any = None, required: bool = False) -> Any:
        self.read.add(name)
        value = self.tree.get(name)
        if value is None:
            value = self.implied.get(name, default)
        if value is None:
            if required:
                self.problems.append(f"{self.where}{name}: missing")
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and number:
            return float(value)
        if kind is int and number and value == int(value):
            return int(value)
        if kind not in (int, float) and isinstance(value, kind):
            return value
        wanted = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            dict: "an object",
        }
        self.problems.append(f"{self.where}{name} = {value!r}: must be {wanted[kind]}")
        return None

    def require(self, condition: bool, name: str, fix: str) -> None:
        if not condition:
            self.problems.append(f"{self.where}{name} = {self.tree.get(name)!r}: {fix}")


def from_hf(tree: dict[str, Any]) -> Imported:
    """The model of a config.json.

    Raises:
      ValueError: `args[0]` is the list of every problem: missing or wrong fields, values that no model here
        has, an impossible shape.
    """
    model_type = tree.get("model_type")
    if not isinstance(model_type, str) or model_type not in IMPLIED:
        raise ValueError([f"model_type = {model_type!r}: supported are {', '.join(sorted(IMPLIED))}"])
    f = _Fields(tree, IMPLIED[model_type])
    mla = any(f.tree.get(name) is not None for name in MLA_FIELDS)
    rope = _rope(f, mla)
    attention = _mla(f) if mla else _baseline(f)
    n_layers = f.get("num_hidden_layers", int, required=True)
    eps = f.get("rms_norm_eps", float, 1e-6)
    values = {
        "vocab_size": f.get("vocab_size", int, required=True),
        "d_model": f.get("hidden_size", int, required=True),
        "n_layers": n_layers,
        "d_ff": f.get("intermediate_size", int, required=True),
        "max_seq_len": f.get("max_position_embeddings", int, 2048),
        "norm_eps": eps,
        "init_std": f.get("initializer_range", float, 0.02),
        "tie_embeddings": f.get("tie_word_embeddings", bool, False),
        "mtp": MTPConfig(depth=_depth(f)),
    }
    moe = _moe(f) if f.tree.get("n_routed_experts") is not None else MoEConfig(n_dense_layers=n_layers or 0)
    fp8 = _quantisation(f)
    for name, only in FIXED.items():
        if name in tree:
            f.read.add(name)
            f.require(tree[name] is None or tree[name] == only, name, f"only {only!r} is supported")
    if f.problems:
        raise ValueError(f.problems)
    config = ModelConfig(**values, attention=attention, rope=rope, moe=moe)
    problems = [
        f"{p.field} = {p.value!r}: {p.fix}" for p in check(Config(model=config)) if _of_model(p.field)
    ]
    if problems:
        raise ValueError(problems)
    rest = sorted(set(tree) - f.read - {"model_type"})
    notes = [
        f"config.json: {name} = {tree[name]!r}: unknown field, not used"
        for name in rest
        if name not in UNUSED
    ]
    return Imported(config, fp8, notes, [name for name in rest if name in UNUSED])


def _of_model(field: str) -> bool:
    return field.startswith("model.")


def _mla(f: _Fields) -> AttentionConfig:
    heads = f.get("num_attention_heads", int, required=True)
    kv_heads = f.get("num_key_value_heads", int, heads)
    f.require(kv_heads == heads, "num_key_value_heads", f"latent attention has one a head: {heads}")
    rope = f.get("qk_rope_head_dim", int, required=True)
    for name in ("head_dim", "qk_head_dim"):  # transformers writes them beside what they follow from.
        f.get(name, int)
    return AttentionConfig(
        kind="mla",
        n_heads=heads or 1,
        q_lora_rank=f.get("q_lora_rank", int) or 0,
        kv_lora_rank=f.get("kv_lora_rank", int, required=True) or 1,
        qk_nope_head_dim=f.get("qk_nope_head_dim", int, required=True) or 1,
        qk_rope_head_dim=rope or 2,
        v_head_dim=f.get("v_head_dim", int, required=True) or 1,
    )


def _baseline(f: _Fields) -> AttentionConfig:
    heads = f.get("num_attention_heads", int, required=True) or 1
    kv_heads = f.get("num_key_value_heads", int, heads)
    width = f.get("hidden_size", int) or heads
    kind = "mha" if kv_heads == heads else "mqa" if kv_heads == 1 else "gqa"
    head_dim = f.get("head_dim", int, width // heads) or 2
    return AttentionConfig(kind=kind, n_heads=heads, n_kv_heads=kv_heads or 1, head_dim=head_dim)


def _moe(f: _Fields) -> MoEConfig:
    scoring = f.get("scoring_func", str, "softmax")
    method = f.get("topk_method", str, "greedy")
    known = {("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy")}
    f.require((scoring, method) in known, "topk_method", f"unsupported with scoring_func = {scoring!r}")
    groups, reach = f.get("n_group", int, 1) or 1, f.get("topk_group", int, 1) or 1
    if method == "greedy":  # The released code looks at groups under the other methods only.
        groups = reach = 1
    normalise = f.get("norm_topk_prob", bool, False) or False
    scale = f.get("routed_scaling_factor", float, 1.0) or 1.0
    if scoring == "softmax" and normalise:
        scale = 1.0  # DeepSeek-V2's code scales the gates only where it does not normalise them.
    return MoEConfig(
        n_dense_layers=f.get("first_k_dense_replace", int, 0) or 0,
        n_experts=f.get("n_routed_experts", int, required=True) or 1,
        n_shared=f.get("n_shared_experts", int, 0) or 0,
        top_k=f.get("num_experts_per_tok", int, required=True) or 1,
        d_ff_expert=f.get("moe_intermediate_size", int, required=True) or 1,
        n_groups=groups,
        topk_groups=reach,
        group_score="top2_sum" if method == "noaux_tc" else "max",
        gate=scoring if scoring in ("sigmoid", "softmax") else "sigmoid",
        normalize_gates=normalise,
        routed_scale=scale,
        bias_speed=0.001 if method == "noaux_tc" else 0.0,
    )


def _depth(f: _Fields) -> int:
    """Prediction layers; transformers calls the field `num_mtp_layers`."""
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    depths = [depth for name in names if (depth := f.get(name, int)) is not None and name in f.tree]
    f.require(len(set(depths)) < 2, names[0], f"{names[1]} = {f.tree.get(names[1])!r} says otherwise")
    return depths[0] if depths else 0


def _rope(f: _Fields, mla: bool) -> RopeConfig:
    """Rotary fields: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    new, old = f.get("rope_parameters", dict), f.get("rope_scaling", dict)
    f.require(new is None or old is None or new == old, "rope_parameters", "rope_scaling says otherwise")
    tree = dict(new or old or {})
    theta = f.get("rope_theta", float, 10000.0)
    inner = _Fields(tree, {}, "rope_parameters." if new else "rope_scaling.")
    theta = inner.get("rope_theta", float, theta)
    kind = inner.get("rope_type", str) or inner.get("type", str, "default")
    inner.read |= {"type", "rope_type"}
    inner.require(kind in ("default", "yarn"), "type", "supported are default and yarn")
    values: dict[str, Any] = {"theta": theta or 2.0}
    if kind == "yarn":
        # Without them DeepSeek's code takes mscale 1 on cosine and sine, and leaves the softmax alone. A head
        # that is rotated whole feels the same factor either way: the square of it in the product.
        defaults = {
            "factor": None,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1,
            "mscale_all_dim": 0 if mla else 1,
        }
        longest = f.tree.get("max_position_embeddings")
        defaults["original_max_position_embeddings"] = longest
        for name, ours in YARN.items():
            kind_of = int if name.startswith("original") else float
            value = inner.get(name, kind_of, defaults[name], required=True)
            values[ours] = value if value is not None else 1
        if not mla:
            for name in ("mscale", "mscale_all_dim"):
                inner.require(tree.get(name) is None, name, "supported with latent attention only")
        for name, only in (("attention_factor", None), ("truncate", True)):
            if name in tree:
                inner.read.add(name)
                inner.require(tree[name] == only, name, f"only {only!r} is supported")
    for name in sorted(set(tree) - inner.read):
        inner.problems.append(f"{inner.where}{name} = {tree[name]!r}: unknown field")
    f.problems += inner.problems
    return RopeConfig(interleaved=bool(f.get("rope_interleave", bool, mla)), **values)


def _quantisation(f: _Fields) -> bool:
    tree = f.get("quantization_config", dict)
    if tree is None:
        return False
    inner = _Fields(tree, {}, "quantization_config.")
    inner.require(tree.get("quant_method") == "fp8", "quant_method", "only fp8 is supported")
    inner.require(tree.get("fmt", "e4m3") == "e4m3", "fmt", "only e4m3 is supported")
    inner.require(tree.get("weight_block_size") == [BLOCK, BLOCK], "weight_block_size", "only [128, 128]")
    inner.require(tree.get("scale_fmt") in (None, "float", "ue8m0"), "scale_fmt", "unknown")
    f.problems += inner.problems
    return True

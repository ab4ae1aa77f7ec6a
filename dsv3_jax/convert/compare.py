"""Which fields of `ModelConfig` decide what a model computes, and where two models differ in them."""

from typing import Any, NamedTuple

from dsv3_jax.config import ModelConfig

_ALWAYS = ("vocab_size", "d_model", "n_layers", "d_ff", "norm_eps", "tie_embeddings", "attention.kind")
_ALWAYS += ("attention.n_heads", "rope.theta", "rope.interleaved", "rope.yarn_factor")
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_ATTENTION = {"mla": (*_MLA, "latent_norm_eps"), "gqa": ("n_kv_heads", "head_dim")}
_YARN = ("yarn_original_len", "yarn_beta_fast", "yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim")
_MOE = ("n_experts", "n_shared", "top_k", "d_ff_expert", "n_groups", "topk_groups")
_MOE += ("gate", "normalize_gates", "routed_scale")


class Difference(NamedTuple):
    """A field in which two models differ."""

    field: str  # Dotted, below `model`.
    first: Any
    second: Any


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide the arrays and the logits of a model, by dotted name, in the order of `Config`.

    Balancing, initialisation, the longest sequence and the choice of kernels are none. A field that another
    one switches off is left out, and of values that mean the same there is one.
    """
    names = [*_ALWAYS]
    names += [f"attention.{name}" for name in _ATTENTION.get(config.attention.kind, ("head_dim",))]
    if config.rope.yarn_factor != 1:
        # A head that is rotated whole feels only `yarn_mscale`.
        yarn = _YARN if config.attention.kind == "mla" else _YARN[:-1]
        names += [f"rope.{name}" for name in yarn]
    names.append("moe.n_dense_layers")
    if config.moe.n_dense_layers < config.n_layers:
        names += [f"moe.{name}" for name in _MOE]
        if config.moe.n_groups > config.moe.topk_groups:
            names.append("moe.group_score")
    names.append("mtp.depth")
    if config.mtp.depth:
        names.append("mtp.kind")
    return {name: _meaning(config, name) for name in names}


def value(config: ModelConfig, name: str) -> Any:
    """A field by its dotted name."""
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    return node


def _meaning(config: ModelConfig, name: str) -> Any:
    """A field's value, or the one that stands for all that mean the same."""
    if name == "moe.n_dense_layers":
        return min(config.moe.n_dense_layers, config.n_layers)
    if name in ("moe.n_groups", "moe.topk_groups") and config.moe.n_groups == config.moe.topk_groups:
        return 1  # Every group is within reach.
    return value(config, name)


def differences(first: ModelConfig, second: ModelConfig) -> list[Difference]:
    """Every field in which `second` must be changed to compute what `first` does, with the values of both."""
    return [
        Difference(name, wanted, value(second, name))
        for name, wanted in architecture(first).items()
        if _meaning(second, name) != wanted
    ]


def same_model(first: ModelConfig, second: ModelConfig) -> bool:
    """Whether two configurations compute the same logits from the same arrays."""
    return not differences(first, second)

"""The parameters arranged for generation: a layer apart from the next, cast and absorbed once."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from pallas_kernels import implementations

# What training also reads in float32: the router and the norms.
_WIDE = ("centroids", "bias", "scale")


class Weights(NamedTuple):
    """What a decode step reads.

    Layers are separate arrays: a slice of a stack would be copied at every step. A layer is
    `{"attention_norm", "attention", "ffn_norm", "ffn" | "moe"}`; a depth of MTP has such a layer as "block",
    its "norm", and in a chain "embedding_norm", "hidden_norm" and "merge".
    """

    embedding: Float[Array, "vocab d"]
    head: Float[Array, "d vocab"]
    final_norm: Float[Array, " d"]
    layers: tuple[dict[str, Any], ...]
    depths: tuple[dict[str, Any], ...]


def kernels_for(weights: Weights) -> contextlib.AbstractContextManager:
    """Where programs that read `weights` are called: our kernels need these on one device, of any number."""
    return implementations.one_device(len(weights.embedding.devices()) == 1)


def prepare(
    variables: Any,
    config: ModelConfig,
    dtype: jax.typing.DTypeLike = jnp.float32,
    merge_shared: bool | None = None,
) -> Weights:
    """The variables of training (`params`, `router`) as `Weights` in `dtype`.

    W_UK and W_UV are split and turned so that decoding applies them to queries and outputs:
    q' = W_UK^T q_C and o = W_UV o' (DeepSeek-V2 §2.1.2). Their products with W_UQ and W_O are not formed:
    at V3's widths those have three times the elements, and decoding is bound by the bytes that it reads.
    `merge_shared` makes the shared experts of a layer experts like the routed ones, after them.
    """
    if merge_shared is None:  # Fewer kernels for a GPU; a CPU would copy slices of the weights.
        merge_shared = implementations.platform() == "gpu"
    return _prepare(meta.unbox(dict(variables)), config, jnp.dtype(dtype), merge_shared)


def _prepare(variables: Any, config: ModelConfig, dtype: jnp.dtype, merge_shared: bool) -> Weights:
    params, router = variables["params"], variables.get("router", {})
    layers = []
    for stack in ("dense_layers", "moe_layers"):
        if stack in params:
            merged = _with_bias(params[stack], router.get(stack))
            for i in range(params[stack]["attention_norm"]["scale"].shape[0]):
                layers.append(
                    _layer(jax.tree.map(lambda leaf, i=i: leaf[i], merged), config, dtype, merge_shared)
                )
    depths = []
    for k in range(1, config.mtp.depth + 1):
        part = dict(params[f"mtp_{k}"])
        block = _with_bias(part.pop("block"), router.get(f"mtp_{k}", {}).get("block"))
        depths.append(_cast(part, dtype) | {"block": _layer(block, config, dtype, merge_shared)})
    embedding = params["embedding"].astype(dtype)
    head = embedding.T if config.tie_embeddings else params["head"].astype(dtype)
    return Weights(embedding, head, params["final_norm"]["scale"], tuple(layers), tuple(depths))


def _with_bias(params: Any, router: Any) -> Any:
    if "moe" not in params:
        return params
    return {**params, "moe": {**params["moe"], "bias": router["moe"]["bias"]}}


def _cast(tree: Any, dtype: jnp.dtype) -> Any:
    """Matrices in `dtype`; a norm, `{"scale": ...}` in training, is its scale."""
    if not isinstance(tree, dict):
        return tree.astype(dtype)
    if set(tree) == {"scale"}:
        return tree["scale"].astype(jnp.float32)
    return {k: v.astype(jnp.float32) if k in _WIDE else _cast(v, dtype) for k, v in tree.items()}


def _layer(layer: Any, config: ModelConfig, dtype: jnp.dtype, merge_shared: bool) -> dict[str, Any]:
    out = _cast(layer, dtype)
    attention = out["attention"]
    attention["w_o"] = attention["w_o"].reshape(-1, config.d_model)
    if config.attention.kind == "mla":
        out["attention"] = _absorbed(attention, config)
    if "moe" in out and config.moe.n_shared and merge_shared:
        out["moe"] = _with_shared(out["moe"], config.moe.n_shared)
    return out


def _absorbed(w: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The weights of MLA: what multiplies the same input in one matrix, W_UK and W_UV turned."""
    w_uk, w_uv = jnp.split(w.pop("w_uk_uv"), [config.attention.qk_nope_head_dim], axis=-1)
    w_uq = w.pop("w_uq_qr")
    w_uq = w_uq.reshape(w_uq.shape[0], -1)
    if "w_dq" in w:
        first, w["w_uq_qr"] = w.pop("w_dq"), w_uq
    else:
        first = w_uq
    return w | {
        "w_in": jnp.concatenate([first, w.pop("w_dkv_kr")], axis=1),  # [d, q + rank + rope]
        "w_uk": jnp.transpose(w_uk, (1, 2, 0)),  # [heads, nope, rank]
        "w_uv": jnp.transpose(w_uv, (1, 0, 2)),  # [heads, rank, v]
    }


def _with_shared(w: dict[str, Any], count: int) -> dict[str, Any]:
    """The shared experts as experts that every token chooses, after the routed ones."""
    shared = w.pop("shared")
    d = shared["gate_up"].shape[0]
    gate, up = (half.reshape(d, count, -1) for half in jnp.split(shared["gate_up"], 2, axis=1))
    gate_up = jnp.moveaxis(jnp.concatenate([gate, up], -1), 1, 0)  # [shared, d, 2f]
    down = shared["down"].reshape(count, -1, d)
    return w | {
        "gate_up": jnp.concatenate([w["gate_up"], gate_up]),
        "down": jnp.concatenate([w["down"], down]),
    }

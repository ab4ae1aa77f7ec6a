"""The DeepSeekMoE layer in generation: what a token costs is the experts that it chooses."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import MoEConfig
from dsv3_jax.model.experts import experts_on_rows
from dsv3_jax.model.layers import ffn, swiglu
from dsv3_jax.model.router import route


def moe(w: Any, u: Float[Array, "batch seq d"], config: MoEConfig) -> Float[Array, "batch seq d"]:
    """`FFN_shared(u) + sum_i g_i FFN_i(u)` (DeepSeek-V3 eq 12), without the residual."""
    routing = route(u, w["centroids"], w["bias"], config)
    x, indices, gates = (part.reshape(-1, part.shape[-1]) for part in (u, routing.indices, routing.gates))
    if indices.size <= config.n_experts:
        out = chosen_experts(x, indices, gates, w["gate_up"], w["down"])
    else:
        out = experts_on_rows(x, indices, gates, w["gate_up"], w["down"], config.implementation)
    out = out.reshape(u.shape)
    if config.n_shared:
        out = out + ffn(u, w["shared"]["gate_up"], w["shared"]["down"])
    return out


def chosen_experts(
    x: Float[Array, "tokens d"],
    indices: Int[Array, "tokens top_k"],
    gates: Float[Array, "tokens top_k"],
    gate_up: Float[Array, "experts d two_f"],
    down: Float[Array, "experts f d"],
) -> Float[Array, "tokens d"]:
    """sum_i g_i FFN_i(x), choice by choice: it reads the weights of the experts chosen, no others."""
    out = []
    for token in range(x.shape[0]):
        total = jnp.zeros((1, x.shape[1]), jnp.float32)
        for choice in range(indices.shape[1]):
            expert = indices[token, choice]
            first = jax.lax.dynamic_index_in_dim(gate_up, expert, keepdims=False)
            second = jax.lax.dynamic_index_in_dim(down, expert, keepdims=False)
            hidden = swiglu(x[token : token + 1] @ first).astype(jnp.float32) * gates[token, choice]
            total += jnp.matmul(hidden.astype(x.dtype), second, preferred_element_type=jnp.float32)
        out.append(total)
    return jnp.concatenate(out).astype(x.dtype)

"""The DeepSeekMoE layer in generation: what a token costs is the experts that it chooses."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import MoEConfig
from dsv3_jax.generation.linear import in_float32
from dsv3_jax.model.experts import experts_on_rows
from dsv3_jax.model.layers import ffn, swiglu
from dsv3_jax.model.router import select
from pallas_kernels import implementations
from pallas_kernels.gather_matvec import gather_matvec

# A product for each choice pays up to one choice for so many experts: a CPU copies the matrices.
SHARES = {"cpu": 4, "gpu": 1, "tpu": 1}


def moe(w: Any, u: Float[Array, "batch seq d"], config: MoEConfig) -> Float[Array, "batch seq d"]:
    """`FFN_shared(u) + sum_i g_i FFN_i(u)` (DeepSeek-V3 eq 12), without the residual.

    Shared experts that `weights.prepare` has put after the routed ones are chosen by everybody, with gate 1.
    """
    routing = select(in_float32(u, w["centroids"]), w["bias"], config)
    x, indices, gates = (part.reshape(-1, part.shape[-1]) for part in (u, routing.indices, routing.gates))
    few = SHARES[implementations.platform()] * indices.size <= config.n_experts
    apart = "shared" in w
    if config.n_shared and not apart:
        shared = config.n_experts + jnp.arange(config.n_shared, dtype=indices.dtype)
        indices = jnp.concatenate([indices, jnp.broadcast_to(shared, (len(x), config.n_shared))], -1)
        gates = jnp.pad(gates, ((0, 0), (0, config.n_shared)), constant_values=1.0)
    if few:
        out = chosen_experts(x, indices, gates, w["gate_up"], w["down"])
    else:
        out = experts_on_rows(x, indices, gates, w["gate_up"], w["down"], config.implementation)
    out = out.reshape(u.shape)
    return out + ffn(u, w["shared"]["gate_up"], w["shared"]["down"]) if apart else out


def chosen_experts(
    x: Float[Array, "tokens d"],
    indices: Int[Array, "tokens choices"],
    gates: Float[Array, "tokens choices"],
    gate_up: Float[Array, "experts d two_f"],
    down: Float[Array, "experts f d"],
) -> Float[Array, "tokens d"]:
    """sum_i g_i FFN_i(x), choice by choice: it reads the weights of the experts chosen, no others."""
    choices, flat = indices.shape[1], indices.reshape(-1)
    product = functools.partial(gather_matvec, rows_alike=choices)  # A token adds up as it would alone.
    hidden = swiglu(product(jnp.repeat(x, choices, axis=0), gate_up, flat)) * gates.reshape(-1, 1)
    out = product(hidden.astype(x.dtype), down, flat).reshape(*indices.shape, -1)
    # Written as additions, which the compiler merges with what reads the sum.
    return functools.reduce(jnp.add, (out[:, i] for i in range(choices))).astype(x.dtype)

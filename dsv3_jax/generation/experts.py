"""The DeepSeekMoE layer in generation: what a token costs is the experts that it chooses."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import MoEConfig
from dsv3_jax.generation.linear import Rows, alike, as_rows, linear
from dsv3_jax.model.experts import experts_on_rows
from dsv3_jax.model.layers import swiglu
from dsv3_jax.model.router import route
from pallas_kernels import implementations
from pallas_kernels.gather_matvec import gather_matvec

# A product for each choice pays up to one choice for so many experts: a CPU copies the matrices.
SHARES = {"cpu": 4, "gpu": 1, "tpu": 1}


def moe(
    w: Any, u: Float[Array, "batch seq d"], config: MoEConfig, rows: Rows | None = None
) -> Float[Array, "batch seq d"]:
    """`FFN_shared(u) + sum_i g_i FFN_i(u)` (DeepSeek-V3 eq 12), without the residual.

    Shared experts that `weights.prepare` has put after the routed ones are chosen by everybody, with gate 1.
    Rows after the real ones (`linear.Rows`) choose nobody.
    """
    routing = alike(route, rows, u, w["centroids"], w["bias"], config)
    x = u.reshape(-1, u.shape[-1])
    indices, gates = (part.reshape(len(x), -1) for part in (routing.indices, routing.gates))
    few = SHARES[implementations.platform()] * indices.size <= config.n_experts
    apart = "shared" in w
    if config.n_shared and not apart:
        shared = config.n_experts + jnp.arange(config.n_shared, dtype=indices.dtype)
        indices = jnp.concatenate([indices, jnp.broadcast_to(shared, (len(indices), config.n_shared))], -1)
        gates = jnp.pad(gates, ((0, 0), (0, config.n_shared)), constant_values=1.0)
    weights = w["gate_up"], w["down"]
    if few:
        real = rows.real if rows else None
        out = as_rows(chosen_experts(x, indices[:real], gates[:real], *weights), rows)
    else:
        if rows is not None:  # An expert that does not exist has no rows to multiply.
            indices = jnp.where(jnp.arange(len(x))[:, None] < rows.real, indices, len(weights[0]))
        grouped = functools.partial(experts_on_rows, implementation=config.implementation)
        out = alike(grouped, rows, x, indices, gates, *weights)
    out = out.reshape(u.shape)
    if not apart:
        return out
    return out + linear(swiglu(linear(u, w["shared"]["gate_up"], rows)), w["shared"]["down"], rows)


def chosen_experts(
    x: Float[Array, "rows d"],
    indices: Int[Array, "tokens choices"],
    gates: Float[Array, "tokens choices"],
    gate_up: Float[Array, "experts d two_f"],
    down: Float[Array, "experts f d"],
) -> Float[Array, "tokens d"]:
    """sum_i g_i FFN_i(x), choice by choice: it reads the weights of the experts chosen, no others.

    Rows of `x` after the tokens are not read.
    """
    choices, flat = indices.shape[1], indices.reshape(-1)
    product = functools.partial(gather_matvec, alike=choices)  # A token adds up as it would alone.
    hidden = swiglu(product(x, gate_up, flat, each=choices)) * gates.reshape(-1, 1)
    out = product(hidden.astype(x.dtype), down, flat).reshape(*indices.shape, -1)
    # Written as additions, which the compiler merges with what reads the sum.
    return functools.reduce(jnp.add, (out[:, i] for i in range(choices))).astype(x.dtype)

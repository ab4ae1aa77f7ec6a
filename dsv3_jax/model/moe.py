"""The DeepSeekMoE layer (arXiv 2401.06066; DeepSeek-V3 §2.1.2): shared and routed experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsv3_jax.config import FP8Config, ModelConfig
from dsv3_jax.model.balance import balance_loss
from dsv3_jax.model.experts import routed_experts
from dsv3_jax.model.layers import FFN, weight
from dsv3_jax.model.router import Routing, load, route
from dsv3_jax.parallel.mesh import size_here


class RouterReport(NamedTuple):
    """What a MoE layer tells the train step: an output, so that recomputing counts nothing twice."""

    counts: Int[Array, "*layers experts"]  # Tokens sent to each expert.
    balance_loss: Float[Array, "*layers"]


class MoE(nn.Module):
    """`FFN_shared(u) + sum_i g_i FFN_i(u)` (V3 eq 12), without the residual.

    The last `tail` positions of a sequence count neither towards the load nor in the balance loss.
    The router bias is the variable `bias` of the collection `router`: float32 state, not a parameter.
    """

    config: ModelConfig
    tail: int = 0
    recipe: FP8Config | None = None

    @nn.compact
    def __call__(self, u: Float[Array, "batch seq d"]) -> tuple[Float[Array, "batch seq d"], RouterReport]:
        moe, d, std = self.config.moe, self.config.d_model, self.config.init_std
        centroids = weight(self, "centroids", (d, moe.n_experts), ("embed", None), std)
        bias = self.variable("router", "bias", jnp.zeros, (moe.n_experts,), jnp.float32)
        here = size_here(moe.n_experts, "experts")
        shape = (here, d, 2 * moe.d_ff_expert)
        gate_up = weight(self, "gate_up", shape, ("experts", "embed", "mlp"), std)
        shape = (here, moe.d_ff_expert, d)
        down = weight(self, "down", shape, ("experts", "mlp", "embed"), std)

        with jax.named_scope("route"):
            routing = route(u, centroids, bias.value, moe)
        # Nothing orders the shared experts after the routed ones: they run while tokens travel.
        with jax.named_scope("routed_experts"):
            groups = (moe.n_groups, moe.topk_groups)
            out = routed_experts(
                u, routing.indices, routing.gates, gate_up, down, moe.implementation, self.recipe, groups
            )
        if moe.n_shared:
            with jax.named_scope("shared_experts"):
                out += FFN(moe.n_shared * moe.d_ff_expert, std, self.recipe, name="shared")(u)
        counted = routing
        if self.tail:
            counted = Routing(*(x[:, : -self.tail] for x in routing))
        return out, RouterReport(load(counted.indices, moe.n_experts), balance_loss(counted, moe))

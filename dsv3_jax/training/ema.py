"""Exponential moving average of the parameters, on the device or in host memory (DeepSeek-V3 §3.2.3).

The update is a program of its own, dispatched after the training step and not waited for: the host goes
on to the next batch. In host memory the average costs the device no room beyond one leaf in transit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

Params = Any  # A nested dict of arrays: Flax's "params" collection.
Shardings = Any  # A tree of `jax.sharding.Sharding`, one a parameter.
Update = Callable[[Params, Params, Bool[Array, ""]], Params]

MEMORY_KINDS = {"device": "device", "host": "pinned_host"}


def shardings(param_shardings: Shardings, memory: str) -> Shardings:
    """Shardings of the average: those of the parameters, in `memory` ("device" or "host")."""
    kind = MEMORY_KINDS[memory]
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), param_shardings)


def init(params: Params, ema_shardings: Shardings) -> Params:
    """The average before the first step: a copy of `params` in fp32, laid out as `ema_shardings` says."""

    def leaf(p: Array, sharding: jax.sharding.Sharding) -> Array:
        # A copy even on the device: the training step donates the parameters.
        return jax.device_put(jnp.array(p, jnp.float32, copy=True), sharding)

    return jax.tree.map(leaf, params, ema_shardings)


def make_update(decay: float, ema_shardings: Shardings) -> Update:
    """The jitted `update(ema, params, finite) -> ema`: `decay * ema + (1 - decay) * params` in fp32.

    `ema` is donated, and comes back as it was where `finite` is false. Returns before the work is done.
    """

    def update(ema: Params, params: Params, finite: Bool[Array, ""]) -> Params:
        def leaf(average: Array, p: Array, sharding: jax.sharding.Sharding) -> Array:
            average = jax.device_put(average, sharding.with_memory_kind("device"))
            new = average + (1 - decay) * (p.astype(jnp.float32) - average)
            return jax.device_put(jnp.where(finite, new, average), sharding)

        with jax.named_scope("ema"):
            return jax.tree.map(leaf, ema, params, ema_shardings)

    return jax.jit(update, donate_argnums=0, out_shardings=ema_shardings)

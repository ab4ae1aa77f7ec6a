"""Exponential moving average of the parameters, on the device or in host memory (DeepSeek-V3 §3.2.3).

The update is a program of its own, dispatched after the training step and not waited for: the host goes
on to the next batch. In host memory the average visits the device a slice at a time: on an H200, moving
it whole took 1.7 times its size there, and in four slices a third of its size, in the same time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Array, Bool

Params = Any  # A nested dict of arrays: Flax's "params" collection.
Shardings = Any  # A tree of `jax.sharding.Sharding`, one a parameter.
Update = Callable[[Params, Params, Bool[Array, ""]], Params]

DEVICE, HOST = "device", "pinned_host"
MEMORY_KINDS = {"device": DEVICE, "host": HOST}
# At most so many slices: more would be too small to use the link well.
MAX_SLICES = 64


def shardings(param_shardings: Shardings, memory: str) -> Shardings:
    """Shardings of the average: those of the parameters, in `memory` ("device" or "host")."""
    kind = MEMORY_KINDS[memory]
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), param_shardings)


def init(params: Params, ema_shardings: Shardings) -> Params:
    """The average before the first step: a copy of `params` in fp32, laid out as `ema_shardings` says."""

    def leaf(p: Array, sharding: Sharding) -> Array:
        # A copy even on the device: the training step donates the parameters.
        return jax.device_put(jnp.array(p, jnp.float32, copy=True), sharding)

    return jax.tree.map(leaf, params, ema_shardings)


def make_update(decay: float, ema_shardings: Shardings) -> Update:
    """The jitted `update(ema, params, finite) -> ema`: `decay * ema + (1 - decay) * params` in fp32.

    `ema` is donated, and comes back as it was where `finite` is false. Returns before the work is done.
    """

    def update(ema: Params, params: Params, finite: Bool[Array, ""]) -> Params:
        def mix(average: Array, p: Array) -> Array:
            return jnp.where(finite, average + (1 - decay) * (p.astype(jnp.float32) - average), average)

        def leaf(average: Array, p: Array, sharding: Sharding) -> Array:
            return _on_host(mix, average, p, sharding) if sharding.memory_kind == HOST else mix(average, p)

        with jax.named_scope("ema"):
            return jax.tree.map(leaf, ema, params, ema_shardings)

    return jax.jit(update, donate_argnums=0, out_shardings=ema_shardings)


def _on_host(mix: Callable[[Array, Array], Array], average: Array, p: Array, sharding: Sharding) -> Array:
    """`mix(average, p)` for an average in host memory, slice by slice along its first axis."""
    on_device = sharding.with_memory_kind(DEVICE)
    size = _slice_size(average.shape, sharding)
    if not size:
        return jax.device_put(mix(jax.device_put(average, on_device), p), sharding)

    def body(i: Array, average: Array) -> Array:
        old = lax.dynamic_slice_in_dim(average, i * size, size)
        new = mix(jax.device_put(old, on_device), lax.dynamic_slice_in_dim(p, i * size, size))
        return lax.dynamic_update_slice_in_dim(average, jax.device_put(new, sharding), i * size, 0)

    return lax.fori_loop(0, average.shape[0] // size, body, average)


def _slice_size(shape: tuple[int, ...], sharding: Sharding) -> int:
    """Rows a slice: of stacked layers, one layer. 0: no slices, because devices share the first axis."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
    if not shape or (spec and spec[0] is not None):
        return 0
    return shape[0] // max(n for n in range(1, MAX_SLICES + 1) if shape[0] % n == 0)

"""Exponential moving average of the parameters, on the device or in host memory (DeepSeek-V3 §3.2.3).

The update is a program of its own, dispatched after the training step and not waited for: the host goes
on to the next batch. In host memory the average visits the device part by part (`training.visits`): on an
H200, moving it whole took 1.7 times its size there, and in four parts a third of its size, in the same time.
Where it can, training updates an average in host memory beside the next step instead (`training.ema_beside`).
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Array, Bool

from dsv3_jax.training import visits

Params = Any  # A nested dict of arrays: Flax's "params" collection.
Shardings = Any  # A tree of `jax.sharding.Sharding`, one a parameter.
Update = Callable[[Params, Params, Bool[Array, ""]], Params]

DEVICE, HOST = "device", "pinned_host"
MEMORY_KINDS = {"device": DEVICE, "host": HOST}
# At most so many parts: more would be too small to use the link well.
MAX_PARTS = 64


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
            return averaged(decay, average, p, finite)

        with jax.named_scope("ema"):
            places = jax.tree.leaves(ema_shardings)
            if all(place.memory_kind != HOST for place in places):
                return jax.tree.map(mix, ema, params)
            averages, new = jax.tree.leaves(ema), jax.tree.leaves(params)
            counts = [_visits(leaf.shape, place) for leaf, place in zip(averages, places, strict=True)]
            mixed: dict[int, Array] = {}
            shared = not all(place.is_fully_replicated for place in places)
            for count in sorted(set(counts)):
                chosen = [number for number, n in enumerate(counts) if n == count]
                found = _visiting(mix, [averages[n] for n in chosen], [new[n] for n in chosen], count, shared)
                mixed |= zip(chosen, found, strict=True)
            return jax.tree.structure(ema).unflatten([mixed[number] for number in range(len(averages))])

    return jax.jit(update, donate_argnums=0, out_shardings=ema_shardings)


def averaged(decay: float, average: Array, p: Array, finite: Bool[Array, ""]) -> Array:
    """The average of an array after a step to `p`, in fp32; as it was where the step is not `finite`."""
    return jnp.where(finite, average + (1 - decay) * (p.astype(jnp.float32) - average), average)


def _visiting(
    mix: Callable[[Array, Array], Array], averages: list[Array], params: list[Array], count: int, shared: bool
) -> list[Array]:
    """`mix` of averages that are in host memory, in `count` turns, with their parameters."""
    lanes: tuple[list[int], list[int]] = [], []  # Of about as many bytes, to take turns.
    for number in sorted(range(len(averages)), key=lambda number: -averages[number].size):
        min(lanes, key=lambda lane: sum(averages[n].size for n in lane)).append(number)
    cuts = [visits.blocks(average, count, shared) for average in averages]
    chain = [[(number, block) for number in lane for block in range(cuts[number])] for lane in lanes]
    new = list(map(visits.cut, params, cuts))

    def visit(turn, averages):
        averages = list(averages)
        for pair in itertools.zip_longest(*chain):
            for number, block in filter(None, pair):
                at = block, cuts[number]
                mixed = mix(turn.arrive(averages[number], *at), turn.take(new[number], *at))
                averages[number] = turn.leave(averages[number], mixed, *at)
        return averages

    found = visits.in_turns(count, list(map(visits.cut, averages, cuts)), visit)
    return [mixed.reshape(p.shape) for mixed, p in zip(found, params, strict=True)]


def _visits(shape: tuple[int, ...], sharding: Sharding) -> int:
    """Turns in which an average visits: of stacked layers, one each. 1 where devices share the first axis."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
    if not shape or (spec and spec[0] is not None):
        return 1
    return max(n for n in range(1, MAX_PARTS + 1) if shape[0] % n == 0)

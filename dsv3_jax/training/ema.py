"""Exponential moving average of the parameters, on the device or in host memory (DeepSeek-V3 §3.2.3).

The update is a program of its own, dispatched after the training step and not waited for: the host goes
on to the next batch. In host memory the average visits the device part by part (`training.visits`): on an
H200, moving it whole took 1.7 times its size there, and in four parts a third of its size, in the same time.

A device runs one program at a time. So on GPUs an average in host memory is updated inside the next step's
program, which starts with the parameters that it needs, on streams beside the step's own (`update_beside`).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import xla_metadata
from jax.sharding import Mesh, NamedSharding, Sharding
from jaxtyping import Array, Bool

from dsv3_jax.config import Config
from dsv3_jax.training import visits

Params = Any  # A nested dict of arrays: Flax's "params" collection.
Shardings = Any  # A tree of `jax.sharding.Sharding`, one a parameter.
Update = Callable[[Params, Params, Bool[Array, ""]], Params]

DEVICE, HOST = "device", "pinned_host"
MEMORY_KINDS = {"device": DEVICE, "host": HOST}
# At most so many parts: more would be too small to use the link well.
MAX_PARTS = 64

# Beside a step, at most so much of each array visits at once.
BESIDE_BYTES = 32 << 20
STREAMS = "1", "2"  # While what one carries comes in, what the other carries goes out.
# XLA's passes that give every copy from and to host memory a stream of its own do not know of those that have
# one; and its scheduler lets two calls at a time run beside the rest, so it would wait for all but the last.
COMPILER_OPTIONS = {
    "xla_disable_hlo_passes": "host-memory-transfer-asyncifier,dynamic-slice-copy-fusion-async-wrapper",
    "xla_gpu_experimental_parallel_async_compute_limit": 1024,
}
_call = getattr(xla_metadata, "xla_metadata_call", None)  # Since JAX 0.11.


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
            return _mixed(decay, average, p, finite)

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


def _mixed(decay: float, average: Array, p: Array, finite: Bool[Array, ""]) -> Array:
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


# ---------------------------------------------------------------- beside the next step


def has_streams(mesh: Mesh) -> bool:
    """Whether a program for these devices can run parts of itself on streams of their own."""
    return mesh.devices.flat[0].platform == "gpu" and _call is not None


def is_beside_step(config: Config, mesh: Mesh) -> bool:
    """Whether the average of a step is updated inside the next step's program."""
    return config.train.ema_decay > 0 and config.train.ema_memory == "host" and has_streams(mesh)


def update_beside(
    decay: float,
    ema_shardings: Shardings,
    ema: Params,
    params: Params,
    finite: Bool[Array, ""],
    first: Any,
    streams: bool = True,
) -> tuple[Params, Any]:
    """What `make_update` does, as part of a training step that has `params` as its input.

    XLA orders a program by what needs what. What it starts early needs an early operand, and it waits for the
    result as late as somebody needs it: let the new parameters need it, which overwrite the old ones.

    Args:
      decay: of the average.
      ema_shardings: of the average, in host memory.
      ema: the average before the last step.
      params: the parameters after it.
      finite: whether the last step changed them.
      first: what the step reads first, any tree. It comes back as it was, when the update is on its way.
      streams: beside the step, where the device `has_streams`; without, XLA orders it as it likes.
    """
    averages, new, places = map(jax.tree.leaves, (ema, params, ema_shardings))
    mixed, carried = list(averages), [0] * len(STREAMS)
    with jax.named_scope("ema"):
        if streams:
            assert _call is not None, "no streams before JAX 0.11"
            early = _call(lambda x, *needed: lax.optimization_barrier((x, needed))[0], inlineable="false")
            finite = early(finite, *averages, *new)
            first, _ = lax.optimization_barrier((first, finite))
        for number in sorted(range(len(averages)), key=lambda number: -averages[number].size):
            visit = _beside(decay, *_cuts(averages[number], places[number]))
            if streams and _call is not None:
                lane = carried.index(min(carried))
                carried[lane] += averages[number].size
                visit = _call(visit, _xla_stream_annotation=STREAMS[lane], inlineable="false")
            mixed[number] = visit(averages[number], new[number], finite)
    return jax.tree.structure(ema).unflatten(mixed), first


def _beside(decay: float, parts: int, of: int) -> Callable[[Array, Array, Bool[Array, ""]], Array]:
    """The update of one array, block by block; one result, as XLA makes several wait for each other."""

    def visit(average: Array, p: Array, finite: Bool[Array, ""]) -> Array:
        new = visits.cut(p, of)

        def turn_of(turn: visits.Turn, average: Array) -> Array:
            # The barriers keep copies apart from the arithmetic: a kernel would read host memory itself.
            here = lax.optimization_barrier(turn.arrive(average))
            there = lax.optimization_barrier(_mixed(decay, here, turn.take(new), finite))
            return turn.leave(average, there)

        mixed = visits.in_turns(parts * of, visits.cut(average, of), turn_of).reshape(p.shape)
        # A copy to the host that is the result itself would be taken for one that stays on the device.
        return lax.optimization_barrier(mixed) if parts * of == 1 else mixed

    return visit


def _cuts(average: Array, sharding: Sharding) -> tuple[int, int]:
    """Parts along the first axis, and blocks of each along the second, of at most `BESIDE_BYTES`.

    Fewer where devices share an axis, or where it has not so many divisors.
    """
    shape, local = average.shape, sharding.shard_shape(average.shape)
    size, counts = math.prod(local) * average.dtype.itemsize, [1, 1]
    for axis in range(min(2, len(shape))):
        if local[axis] != shape[axis]:
            break
        divisors = (n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0)
        counts[axis] = next((n for n in divisors if size / n <= BESIDE_BYTES), shape[axis])
        size /= counts[axis]
    return counts[0], counts[1]

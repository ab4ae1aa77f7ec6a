"""The moving average in host memory, updated inside the next step's program on streams beside its own.

A GPU runs one program at a time, and an update that is a program of its own (`training.ema`) hides nothing.
The step starts with the parameters that the update needs. So each piece of the average is one call that XLA
starts before the layers and waits for before AdamW: a loop of [copy in, mix, copy out].

What such a call copies shares its stream, in and out by turns, and two calls cannot change one array at once.
So an array that holds much of all bytes lends its end to arrays of their own (`Average.aside`), to lanes
beside it. They come back (`whole`) before anybody else reads the average.

On several GPUs each divides its own part of every array: nothing of the average travels between them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import xla_metadata
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Shaped

from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import replicated
from dsv3_jax.training import ema, visits
from dsv3_jax.training.ema import Params, Shardings, averaged

# While what some lanes carry comes in, or waits for room to be mixed in, what others carry goes out. But a
# GPU has few queues for copies to the host, and a value that the host awaits stands in one of them behind all
# that lanes put there: in every layer that sends tokens to experts on other devices.
LANES, LANES_ON_SEVERAL = 4, 2  # On one GPU, which has all of the average to carry, and on each of several.
FIRST = 4  # Of the lanes' streams: before it are those that XLA gives small sums over devices, by turns.
LARGEST_SHARE = 1 / 3  # Of all bytes, in one piece: alone in a lane it must not take as long as a step.
BLOCK_BYTES = 96 << 20  # At most so much of each piece visits at once, where an array can be cut so.
# Before the layers. XLA's scheduler works from a program's end and guesses that a call takes 5 ms: with its
# model of how long collectives take, on several GPUs, it would start all after the layers.
EARLY = {"scheduler_hint": "force_delay"}
COMPILER_OPTIONS = {
    # These passes give every copy from and to host memory a stream of its own, also one that has a stream.
    "xla_disable_hlo_passes": "host-memory-transfer-asyncifier,dynamic-slice-copy-fusion-async-wrapper",
    # The scheduler lets two calls at a time run beside the rest, and would wait for all but the last.
    "xla_gpu_experimental_parallel_async_compute_limit": 1024,
    # No CUDA graphs, as it was measured.
    "xla_gpu_graph_min_graph_size": 1 << 30,
}
_call = getattr(xla_metadata, "xla_metadata_call", None)  # Since JAX 0.11.


class Average(NamedTuple):
    """The average as the step updates it. What `aside` holds is stale in `params`."""

    params: Params
    aside: tuple[tuple[Any, ...], ...]  # Of each array, in the tree's order: its last blocks, in pieces.


Update = Callable[[Average, Params, Bool[Array, ""], Any], tuple[Average, Any]]  # See `make_update`.


class Division(NamedTuple):
    """How an array is divided: `turns` blocks, `of` along its second axis, in pieces that end at `ends`."""

    turns: int
    of: int
    ends: tuple[int, ...]

    def pieces(self) -> list[tuple[int, int]]:
        """First block and number of blocks of each. The first piece stays where it is."""
        starts = (0, *self.ends)
        return [(start, end - start) for start, end in zip(starts, self.ends, strict=False)]


def has_streams(mesh: Mesh) -> bool:
    """Whether a program for these devices can run parts of itself on streams of their own.

    With this JAX only: `COMPILER_OPTIONS` name what its XLA has, and another may refuse or want no more.
    """
    known = _call is not None and jax.__version_info__[:2] == (0, 11)
    return known and mesh.devices.flat[0].platform == "gpu"


def lane_count(mesh: Mesh) -> int:
    """How many streams carry the average beside a step on these devices; 0 where they have none for it."""
    if not has_streams(mesh):
        return 0
    return LANES if mesh.size == 1 else LANES_ON_SEVERAL


def applies(config: Config, mesh: Mesh) -> bool:
    """Whether the average of a step is updated inside the next step's program.

    Not where the moments are in host memory too: under `COMPILER_OPTIONS` kernels would read them there.
    """
    train = config.train
    wanted = train.ema_decay > 0 and train.ema_memory == "host"
    return wanted and config.optimizer.memory == "device" and has_streams(mesh)


def divisions(arrays: list[Any]) -> list[Division]:
    """How to divide arrays, given by their shapes, so that no piece has more than `LARGEST_SHARE`."""
    sizes = [math.prod(x.shape) * 4 for x in arrays]
    found = []
    for x, size in zip(arrays, sizes, strict=True):
        counts, left = [1, 1], size
        for axis in range(min(2, x.ndim)):
            divisors = (n for n in range(1, x.shape[axis] + 1) if x.shape[axis] % n == 0)
            counts[axis] = next((n for n in divisors if left / n <= BLOCK_BYTES), x.shape[axis])
            left /= counts[axis]
        turns = counts[0] * counts[1]
        # A piece of one block would be no loop, and its copies kernels.
        pieces = min(math.ceil(size / (LARGEST_SHARE * max(sum(sizes), 1))), max(turns // 2, 1))
        found.append(Division(turns, counts[1], tuple(turns * (n + 1) // pieces for n in range(pieces))))
    return found


def abstract_average(params: Params, shardings: Shardings) -> Average:
    """Shapes and places of an `Average` of `params`, which may be shapes themselves."""

    def whole(p: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(p.shape, np.float32, sharding=place)

    def piece(x: Any, own: Any, division: Division, count: int) -> jax.ShapeDtypeStruct:
        rows, *rest = jax.eval_shape(lambda x: visits.cut(x, division.of), own).shape
        parts = [n // part for n, part in zip(x.shape, own.shape, strict=True)]  # Devices along each axis.
        shape = (n * part for n, part in zip((rows // division.turns * count, *rest), parts, strict=True))
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype, sharding=x.sharding)

    tree = jax.tree.map(whole, params, shardings)
    leaves = jax.tree.leaves(tree)
    own = [jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves]
    aside = [
        tuple(piece(x, part, division, count) for _, count in division.pieces()[1:])
        for x, part, division in zip(leaves, own, divisions(own), strict=True)
    ]
    return Average(tree, tuple(aside))


def _on_each_device(function: Callable[..., Any], places: tuple[Any, ...], result: Any) -> Callable[..., Any]:
    """`function` of what each device has of its arguments, whose shardings are given, as its result's."""
    everywhere = jax.tree.leaves((places, result))
    if not all(isinstance(place, NamedSharding) and place.mesh.size > 1 for place in everywhere):
        return function
    ins, out = jax.tree.map(lambda place: place.spec, (places, result))
    return jax.shard_map(function, mesh=everywhere[0].mesh, in_specs=ins, out_specs=out, check_vma=False)


class Keeper:
    """Takes an average apart for the step, and puts it together for everybody else."""

    def __init__(self, params: Params, shardings: Shardings) -> None:
        """`params` and `shardings` of the average; arrays or their shapes."""
        self._abstract = abstract_average(params, shardings)
        places = jax.tree.map(lambda x: x.sharding, self._abstract)
        take = _on_each_device(_taken, (places.params, places.aside), places.aside)
        put = _on_each_device(_returned, (places.params, places.aside), places.params)
        self._take = jax.jit(take, donate_argnums=1, out_shardings=places.aside)
        self._return = jax.jit(put, donate_argnums=0, out_shardings=places.params)
        self._aside: Any = None

    def apart(self, average: Params) -> Average:
        """Of a whole average. It must not be used again before it is `whole`."""
        if self._aside is None:
            self._aside = jax.tree.map(_zeros, self._abstract.aside)
        return Average(average, self._take(average, self._aside))

    def whole(self, average: Average) -> Params:
        """The average in one again; its arrays are donated or kept for the next `apart`."""
        self._aside = average.aside
        return self._return(average.params, average.aside)


def _zeros(x: Any) -> Array:
    """In host memory, of several processes too, of which each has a part."""
    return jax.device_put(
        jnp.zeros(x.shape, x.dtype, device=x.sharding.with_memory_kind(ema.DEVICE)), x.sharding
    )


def _taken(average: Params, aside: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
    """`aside`, with the blocks of the average that belong there."""
    found = []
    leaves = jax.tree.leaves(average)
    for x, pieces, division in zip(leaves, aside, divisions(leaves), strict=True):
        blocks, new = visits.cut(x, division.of), []
        for piece, (start, count) in zip(pieces, division.pieces()[1:], strict=True):

            def take(turn, piece, start=start, blocks=blocks, turns=division.turns):
                return turn.leave(piece, visits.Turn(start + turn.index, turns).arrive(blocks))

            new.append(visits.in_turns(count, piece, take))
        found.append(tuple(new))
    return tuple(found)


def _returned(average: Params, aside: tuple[tuple[Array, ...], ...]) -> Params:
    """The average with the blocks that are `aside`."""
    leaves, tree = jax.tree.flatten(average)
    found = []
    for x, pieces, division in zip(leaves, aside, divisions(leaves), strict=True):
        blocks = visits.cut(x, division.of)
        for piece, (start, count) in zip(pieces, division.pieces()[1:], strict=True):

            def put(turn, blocks, start=start, piece=piece, turns=division.turns):
                return visits.Turn(start + turn.index, turns).leave(blocks, turn.arrive(piece))

            blocks = visits.in_turns(count, blocks, put)
        found.append(blocks.reshape(x.shape) if pieces else x)
    return tree.unflatten(found)


# ---------------------------------------------------------------- in the step


def make_update(decay: float, params: Params, batch: Any, lanes: int) -> Update:
    """`update` as `(average, params, finite, first) -> (average, first)`, on each device its own part.

    Args:
      decay, lanes: see `update`.
      params: shapes of the parameters, with their shardings.
      batch: the sharding of every array of `first`.
    """
    here = jax.tree.map(lambda x: x.sharding, params)
    places = jax.tree.map(lambda x: x.sharding, abstract_average(params, ema.shardings(here, "host")))

    def run(average: Average, new: Params, finite: Any, first: Any) -> tuple[Average, Any]:
        ins = places, here, replicated(batch.mesh), jax.tree.map(lambda _: batch, first)
        change = functools.partial(update, decay, lanes=lanes)
        return _on_each_device(change, ins, (places, ins[-1]))(average, new, finite, first)

    return run


def update(
    decay: float, average: Average, params: Params, finite: Bool[Array, ""], first: Any, lanes: int
) -> tuple[Average, Any]:
    """What `training.ema.make_update` does, as part of a training step that has `params` as its input.

    XLA orders a program by what needs what. What it starts early needs an early operand, and it waits for the
    result as late as somebody needs it: let the new parameters need it, which overwrite the old ones.

    Args:
      decay: of the average.
      average: before the last step.
      params: the parameters after it.
      finite: whether the last step changed them.
      first: what the step reads first, any tree. It comes back as it was, when the update is on its way.
      lanes: streams that carry it beside the step, see `lane_count`; with 0, XLA orders it as it likes.
    """
    leaves, tree = jax.tree.flatten(average.params)
    new, divided = jax.tree.leaves(params), divisions(leaves)
    arrays = {(number, 0): x for number, x in enumerate(leaves)}
    for number, pieces in enumerate(average.aside):
        arrays |= {(number, k): x for k, x in enumerate(pieces, start=1)}
    parts = {key: divided[key[0]].pieces()[key[1]] for key in arrays}

    def size(key: tuple[int, int]) -> float:
        return leaves[key[0]].size / divided[key[0]].turns * parts[key][1]

    carried = [0.0] * max(lanes, 1)
    with jax.named_scope("ema"):
        if lanes:
            assert _call is not None, "no streams before JAX 0.11"
            early = _call(lambda x, *needed: lax.optimization_barrier((x, needed))[0], inlineable="false")
            finite = early(finite, *arrays.values(), *new)
            first, _ = lax.optimization_barrier((first, finite))
        for key in sorted(arrays, key=size, reverse=True):
            visit = _visit(decay, divided[key[0]], *parts[key])
            lane = carried.index(min(carried))
            carried[lane] += size(key)
            if lanes and _call is not None:
                visit = _call(visit, _xla_stream_annotation=str(FIRST + lane), inlineable="false", **EARLY)
            arrays[key] = visit(arrays[key], new[key[0]], finite)
    aside = tuple(
        tuple(arrays[number, k + 1] for k in range(len(pieces)))
        for number, pieces in enumerate(average.aside)
    )
    return Average(tree.unflatten([arrays[n, 0] for n in range(len(leaves))]), aside), first


def _visit(
    decay: float, division: Division, start: int, count: int
) -> Callable[[Shaped[Array, "..."], Shaped[Array, "..."], Bool[Array, ""]], Array]:
    """The update of one piece, block by block; one result, as XLA makes several wait for each other."""

    def visit(average: Array, p: Array, finite: Bool[Array, ""]) -> Array:
        new = visits.cut(p, division.of)

        def turn_of(turn: visits.Turn, blocks: Array) -> Array:
            there = visits.Turn(start + turn.index, division.turns)
            here = turn if start else there
            # The barriers keep copies apart from the arithmetic: a kernel would read host memory itself.
            old = lax.optimization_barrier(here.arrive(blocks))
            return here.leave(blocks, lax.optimization_barrier(averaged(decay, old, there.take(new), finite)))

        blocks = average if start else visits.cut(average, division.of)
        found = visits.in_turns(count, blocks, turn_of).reshape(average.shape)
        # A copy to the host that is the result itself would be taken for one that stays on the device.
        return lax.optimization_barrier(found) if count == 1 else found

    return visit

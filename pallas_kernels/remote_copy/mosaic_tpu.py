"""`remote_all_to_all` for the chips of one TPU slice, in Pallas: remote DMA through the interconnect.

One program starts a copy for every piece of some rows, to every peer, and then waits for as many as it sent
and as many as it is sent. A last piece takes rows along that are not in use; they are cleared afterwards, as
are the slots that nothing was sent to. A barrier at the start says that all results may be written to, one at
the end that nobody still waits at the start.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import implementations

ROWS = 32  # A piece is a multiple of it: the tile of every dtype.
PIECE = 128 << 10  # Bytes of one copy, about.
COLLECTIVE = 7  # Of kernels with barriers, those with the same number never run at once.


def unsupported(buffer, axis) -> str | None:
    """Why this implementation cannot run the call, or None."""
    del buffer, axis
    if implementations.platform() != "tpu":
        return f"it runs on TPU, not on {implementations.platform()}: take 'reference'"
    if jax.default_backend() == "tpu" and len({getattr(d, "slice_index", 0) for d in jax.devices()}) > 1:
        return "the devices are of several slices, it needs one: take 'reference'"
    return None


def copy(buffer, sent, received, axis, stride, *, interpret=False):
    """The slots in use of every rank, by source, the others zero."""
    ranks, slots = buffer.shape[:2]
    rows = buffer.reshape(ranks, slots, -1)
    length = ROWS * max(1, PIECE // (ROWS * rows.shape[2] * rows.dtype.itemsize))
    length = min(length, ROWS * pl.cdiv(slots, ROWS))
    rows = jnp.pad(rows, ((0, 0), (0, -slots % length), (0, 0)))
    moved = _copy(rows, sent, received, length, axis, stride, interpret)[:, :slots]
    used = jnp.arange(slots) < received[:, None]
    return jnp.where(used[:, :, None], moved, 0).reshape(buffer.shape)


@functools.partial(jax.jit, static_argnames=("length", "axis", "stride", "interpret"))
def _copy(rows, sent, received, length, axis, stride, interpret):
    """The exchange in pieces of `length` rows, which the slots of a rank are a multiple of."""
    ranks = rows.shape[0]

    def kernel(sent, received, source, result, leaving, arriving, ended):
        position = lax.axis_index(axis)
        rank = lax.rem(lax.div(position, stride), ranks)

        def device(peer):
            return {axis: position + (peer - rank) * stride}

        def meet(semaphore):
            for peer in range(ranks):
                pl.semaphore_signal(semaphore, device_id=device(peer))
            pl.semaphore_wait(semaphore, ranks)

        def piece(peer, i):
            rows = pl.ds(pl.multiple_of(i * length, length), length)
            return pltpu.make_async_remote_copy(
                source.at[peer, rows], result.at[rank, rows], leaving, arriving, device_id=device(peer)
            )

        def pieces(counts, peer):
            return lax.div(counts[peer] + length - 1, length)

        meet(pltpu.get_barrier_semaphore())
        for turn in range(ranks):  # Everybody begins with another peer, and ends with itself.
            peer = lax.rem(rank + 1 + turn, ranks)

            @pl.loop(0, pieces(sent, peer))
            def _(i, peer=peer):
                piece(peer, i).start()

        for peer in range(ranks):  # Which piece a wait names does not matter: all have the same size.
            pl.loop(0, pieces(sent, peer))(lambda _: piece(rank, 0).wait_send())
            pl.loop(0, pieces(received, peer))(lambda _: piece(rank, 0).wait_recv())
        meet(ended)

    memory = pl.BlockSpec(memory_space=pl.ANY)
    counts = pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        in_specs=[counts, counts, memory],
        out_specs=memory,
        scratch_shapes=[pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR],
        compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE, has_side_effects=True),
        interpret=interpret,
        name="remote_all_to_all",
    )(sent, received, rows)

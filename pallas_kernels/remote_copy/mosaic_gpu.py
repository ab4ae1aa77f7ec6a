"""`remote_all_to_all` for the GPUs of one process, in Pallas Mosaic GPU: bulk copies through NVLink.

A program takes one peer and every so many-th piece of what it gets: from global into shared memory, and from
there into the peer's result. Stages keep copies of both kinds in flight, and several programs a peer fill the
link. Programs do not wait for each other, so they need not run at once: one of them waits, for the signals of
all peers' programs that what they had for this rank has arrived. A rank clears the slots that no peer writes.

When a peer may be written to, XLA sees to: before the kernel it puts a barrier over all devices of the mesh,
behind which no result is still in use and every semaphore is zero.

A peer's memory is reached by its own address (`remote_ref`); no NVLink multicast is asked for. In several
processes XLA would register all operands as symmetric memory instead: so this runs in one only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import implementations

ALIGNED = 128  # Bytes of a row: a copy is a multiple of it.
MOST_DEVICES = 8  # Of a mesh: the GPUs of one host.


class How(NamedTuple):
    """How the work is divided: what took least on two H200s (`benchmarks/transports.py`)."""

    programs: int = 96  # Of all peers together; they leave multiprocessors for NCCL.
    piece: int = 16384  # Bytes of one copy, at most.
    stages: int = 8  # Pieces that a program holds.
    leaving: int = 4  # Of those, pieces on their way to the peer.


HOW = How()


def unsupported(buffer, axis) -> str | None:
    """Why this implementation cannot run the call, or None."""
    del buffer, axis
    if jax.__version_info__ < (0, 11, 2):
        return f"JAX {jax.__version__} is older than 0.11.2: install dsv3-jax[gpu] on Python 3.12"
    if implementations.platform() != "gpu":
        return f"it runs on NVIDIA Hopper, not on {implementations.platform()}: take 'reference'"
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        return f"compute capability {jax.devices()[0].compute_capability}, it needs 9.0: take 'reference'"
    if jax.process_count() > 1:
        return f"{jax.process_count()} processes, it needs all devices in one: take 'reference'"
    if (devices := jax.sharding.get_abstract_mesh().size) > MOST_DEVICES:
        return f"a mesh of {devices} devices, it takes {MOST_DEVICES} at most: take 'reference'"
    return None


def copy(buffer, sent, received, axis, stride, how: How = HOW):
    """The slots in use of every rank, by source, the others zero."""
    ranks, slots = buffer.shape[:2]
    rows = buffer.reshape(ranks * slots, -1)
    width = rows.shape[1]
    aligned = ALIGNED // rows.dtype.itemsize
    rows = jnp.pad(rows, ((0, 0), (0, -width % aligned)))
    # Rows longer than a piece are cut.
    units = rows.shape[1] // aligned
    parts = next(n for n in range(1, units + 1) if units % n == 0 and units // n * ALIGNED <= how.piece)
    moved = _copy(rows.reshape(-1, rows.shape[1] // parts), parts * sent, parts * received, axis, stride, how)
    return moved.reshape(ranks * slots, -1)[:, :width].reshape(buffer.shape)


@functools.partial(jax.jit, static_argnames=("axis", "stride", "how"))
def _copy(rows, sent, received, axis, stride, how: How):
    """The exchange of `[ranks * slots, width]`, a row at most a piece long."""
    ranks, width = sent.shape[0], rows.shape[1]
    slots, programs = rows.shape[0] // ranks, max(1, how.programs // ranks)
    many = min(slots, max(1, how.piece // (width * rows.dtype.itemsize)))  # Rows of a piece.
    stages, leaving = how.stages, how.leaving

    def kernel(sent, received, source, blank, result, staged, zeros, loaded, ready):
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)  # One for all programs.
        position = lax.axis_index(axis)
        rank = lax.rem(lax.div(position, stride), ranks)
        # Everybody begins with another peer, and ends with itself.
        turn, program = lax.axis_index("peer"), lax.axis_index("program")
        peer = lax.rem(rank + 1 + turn, ranks)
        device = {axis: position + (peer - rank) * stride}
        there = plgpu.remote_ref(result, device)

        def pieces(first, count, length, work):
            """`work(how many of them are this program's, i -> where the i-th begins)`.

            They are `length` rows long, the last moves back to end with the rows; fewer rows go one by one.
            """
            for size in sorted({1, length}):

                @pl.when((count >= length) if size == length else (count < length))
                def _(size=size):
                    in_all = lax.div(count + size - 1, size)
                    mine = lax.div(in_all - program + programs - 1, programs)
                    last = count - size
                    work(size, mine, lambda i: first + jnp.minimum((program + i * programs) * size, last))

        def clear(size, mine, begin):
            @pl.loop(0, mine)
            def _(i):
                plgpu.copy_smem_to_gmem(zeros.at[pl.ds(0, size)], result.at[pl.ds(begin(i), size)])

        def send(size, mine, begin):
            def load(i):
                stage = lax.rem(i, stages)
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(peer * slots + begin(i), size)],
                    staged.at[stage, pl.ds(0, size)],
                    loaded.at[stage],
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

            @pl.loop(0, jnp.minimum(mine, stages))
            def _(i):
                load(i)

            @pl.loop(0, mine)
            def _(i):
                stage = lax.rem(i, stages)
                plgpu.barrier_wait(loaded.at[stage])
                to = there.at[pl.ds(rank * slots + begin(i), size)]
                plgpu.copy_smem_to_gmem(staged.at[stage, pl.ds(0, size)], to)
                following = i - leaving + stages

                @pl.when((i >= leaving) & (following < mine))
                def _():
                    plgpu.wait_smem_to_gmem(leaving, wait_read_only=True)
                    load(following)

        @pl.when(received[peer] < slots)
        def _():
            plgpu.copy_gmem_to_smem(blank, zeros, ready, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
            plgpu.barrier_wait(ready)
            pieces(peer * slots + received[peer], slots - received[peer], many, clear)

        pieces(0, sent[peer], many, send)
        plgpu.wait_smem_to_gmem(0)  # Until all that was written can be seen.
        pl.semaphore_signal(arrived, device_id=device)

        @pl.when((turn == ranks - 1) & (program == 0))
        def _():
            pl.semaphore_wait(arrived, ranks * programs)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        grid=(ranks, programs),
        grid_names=("peer", "program"),
        scratch_types=dict(
            staged=plgpu.SMEM((stages, many, width), rows.dtype),
            zeros=plgpu.SMEM((many, width), rows.dtype),
            loaded=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            ready=plgpu.Barrier(num_arrivals=1),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="remote_all_to_all",
    )(sent, received, rows, jnp.zeros((many, width), rows.dtype))

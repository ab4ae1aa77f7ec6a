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
MOST_ROWS = 8  # Of a piece that are read one by one.


class How(NamedTuple):
    """How the work is divided; see `benchmarks/expert_parallel.py` for what was tried."""

    programs: int = 32  # Of all peers together.
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
    rows, parts = _rows(buffer.reshape(ranks * slots, -1), how)
    moved = _copy(rows, None, parts * sent, parts * received, parts * slots, axis, stride, how)
    return moved.reshape(ranks * slots, -1)[:, : buffer[0, 0].size].reshape(buffer.shape)


def send(table, index, sent, received, axis, stride, how: How = HOW):
    """As `copy` of `table[index]`, whose rows are read where they are if few of them make a piece."""
    (ranks, slots), width = index.shape, table[0].size
    rows, parts = _rows(table.reshape(len(table), -1), how)
    if parts > 1 or how.piece > MOST_ROWS * rows[0].nbytes:
        return copy(jnp.take(table, index, axis=0, mode="clip"), sent, received, axis, stride, how)
    moved = _copy(rows, index.reshape(-1), sent, received, slots, axis, stride, how)
    return moved[:, :width].reshape(ranks, slots, *table.shape[1:])


def _rows(rows, how: How):
    """(rows that copies can move, how many make one of the rows given)."""
    aligned = ALIGNED // rows.dtype.itemsize
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % aligned)))
    units = rows.shape[1] // aligned
    parts = next(n for n in range(1, units + 1) if units % n == 0 and units // n * ALIGNED <= how.piece)
    return rows.reshape(-1, rows.shape[1] // parts), parts


@functools.partial(jax.jit, static_argnames=("slots", "axis", "stride", "how"))
def _copy(rows, index, sent, received, slots, axis, stride, how: How):
    """The exchange of `slots` rows a rank, each at most a piece long: `rows`, or those that `index` names."""
    ranks, width = sent.shape[0], rows.shape[1]
    programs = max(1, how.programs // ranks)
    many = min(slots, max(1, how.piece // (width * rows.dtype.itemsize)))  # Rows of a piece.
    stages, leaving = how.stages, how.leaving

    def kernel(sent, received, source, blank, *rest, staged, zeros, loaded, ready):
        index, result = rest if len(rest) == 2 else (None, *rest)
        arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)  # One for all programs.
        position = lax.axis_index(axis)
        rank = lax.rem(lax.div(position, stride), ranks)
        # Everybody begins with another peer, and ends with itself.
        turn, program = lax.axis_index("peer"), lax.axis_index("program")
        peer = lax.rem(rank + 1 + turn, ranks)
        device = {axis: position + (peer - rank) * stride}
        there = plgpu.remote_ref(result, device)

        def pieces(first, count, work):
            """`work(rows of a piece, how many of them are this program's, i -> where the i-th begins)`.

            Pieces are `many` rows long, the last moves back to end with the rows; fewer rows go one by one.
            """
            for size in sorted({1, many}):

                @pl.when((count >= many) if size == many else (count < many))
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
            def sources(i):
                """Where the rows of piece i are, read an iteration before they are needed."""
                if index is None:
                    return ()
                i = jnp.clip(i, 0, jnp.maximum(mine - 1, 0))
                at = peer * slots + jnp.maximum(begin(i), 0)
                return tuple(index[at + j] for j in range(size))

            def load(i, rows):
                stage = lax.rem(i, stages)
                options = dict(barrier=loaded.at[stage], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
                if index is None:
                    here = source.at[pl.ds(peer * slots + begin(i), size)]
                    plgpu.copy_gmem_to_smem(here, staged.at[stage, pl.ds(0, size)], **options)
                for j, row in enumerate(rows):
                    plgpu.copy_gmem_to_smem(
                        source.at[pl.ds(row, 1)], staged.at[stage, pl.ds(j, 1)], **options
                    )
                if index is not None and size < many:  # The barrier waits for as many copies.
                    for _ in range(many - size):
                        plgpu.barrier_arrive(loaded.at[stage])

            def first(i, rows):
                load(i, rows)
                return sources(i + 1)

            lax.fori_loop(0, jnp.minimum(mine, stages), first, sources(0))

            def step(i, rows):
                stage, following = lax.rem(i, stages), i - leaving + stages
                ahead = sources(following + 1)
                plgpu.barrier_wait(loaded.at[stage])
                to = there.at[pl.ds(rank * slots + begin(i), size)]
                plgpu.copy_smem_to_gmem(staged.at[stage, pl.ds(0, size)], to)

                @pl.when((i >= leaving) & (following < mine))
                def _():
                    plgpu.wait_smem_to_gmem(leaving, wait_read_only=True)
                    load(following, rows)

                return ahead

            lax.fori_loop(0, mine, step, sources(stages - leaving))

        @pl.when(received[peer] < slots)
        def _():
            plgpu.copy_gmem_to_smem(blank, zeros, ready, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
            plgpu.barrier_wait(ready)
            pieces(peer * slots + received[peer], slots - received[peer], clear)

        pieces(0, sent[peer], send)
        plgpu.wait_smem_to_gmem(0)  # Until all that was written can be seen.
        pl.semaphore_signal(arrived, device_id=device)

        @pl.when((turn == ranks - 1) & (program == 0))
        def _():
            pl.semaphore_wait(arrived, ranks * programs)

    operands = (sent, received, rows, jnp.zeros((many, width), rows.dtype))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((ranks * slots, width), rows.dtype),
        grid=(ranks, programs),
        grid_names=("peer", "program"),
        scratch_types=dict(
            staged=plgpu.SMEM((stages, many, width), rows.dtype),
            zeros=plgpu.SMEM((many, width), rows.dtype),
            loaded=plgpu.Barrier(num_arrivals=1 if index is None else many, num_barriers=stages),
            ready=plgpu.Barrier(num_arrivals=1),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="remote_all_to_all",
    )(*operands, *([] if index is None else [index]))

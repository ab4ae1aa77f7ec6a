"""Decoding attention for Hopper in Pallas Mosaic GPU: the kernel for few queries, and for quantised caches.

Up to 16 rows (queries times heads) are the columns of the products, and the cache's entries and the latents'
columns the rows: S^T = K Q^T and O^T = V^T P^T, so that the tensor cores multiply 64 entries with 16 rows and
not with 64, of which most would be padding. Each of two compute warpgroups works on 64 entries of its own;
what they found is added up at the end of a sequence. A third warpgroup loads by TMA, in pieces of 128 columns
that are free again one by one.

Codes of a quantised cache are converted to float16, exactly, in registers: they are an operand of S^T there,
and written to shared memory as one of O^T. The factors of the entries enter the logits and the weights.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import mosaic_gpu_common as common
from pallas_kernels.mla_attention.mosaic_gpu_common import WARPGROUPS, arrive, sync, tiled
from pallas_kernels.mla_decode import mosaic_gpu_pieces as pieces
from pallas_kernels.mla_decode import mosaic_gpu_queries
from pallas_kernels.mla_decode.mosaic_gpu_few_rows_compute import (
    ALL_ROWS,
    ENTRIES,
    Q_FACTOR,
    Q_FREE,
    ROWS,
    THREADS,
    WIDTH,
    Compute,
    Shared,
    free,
    pieces_of,
)
from pallas_kernels.mla_decode.mosaic_gpu_pieces import BLOCK


class _Operands(typing.NamedTuple):
    q: typing.Any
    q_factor: typing.Any
    c_kv: typing.Any
    k_rope: typing.Any
    c_kv_scale: typing.Any
    k_rope_scale: typing.Any
    lengths: typing.Any
    table: typing.Any


def split(q, c_kv, k_rope, c_kv_scale, k_rope_scale, lengths, table, *, call):
    """Partial results of all groups, as `mosaic_gpu_split.split` gives them.

    Args:
      q: bf16 `[batch, rows, rank + rope]`, rows whole tiles.
      c_kv: bf16, or codes, `[batch or pages, slots, rank]`.
      k_rope: likewise `[batch or pages, slots, rope]`.
      c_kv_scale, k_rope_scale: float32 factors `[batch or pages, slots]` of codes, not negative; else None.
      lengths: int32 `[batch]`.
      table: int32 `[batch, max_pages]`, or None for a contiguous cache.
      call: what is static.

    Returns:
      float32 outputs `[parts, part_rows, rank]`, log-sum-exps in base 2 `[parts, tiles * 16]`, and the parts
      of each sequence, int32 `[batch, 2]`, as `pieces.of_group` says.
    """
    codes = None if c_kv_scale is None else c_kv.dtype
    q_factor = None
    if codes is not None:
        q, q_factor = mosaic_gpu_queries.to_half(q)
        c_kv, k_rope = (lax.bitcast_convert_type(x, jnp.int8) for x in (c_kv, k_rope))

    def kernel(*refs):
        operands, outs, bounds, shared = _Operands(*refs[:8]), refs[8:10], refs[10], Shared(*refs[11:])
        program = lax.axis_index("program")
        group, tile = lax.div(program, call.tiles), lax.rem(program, call.tiles)
        for_every_piece = pieces.of_group(call, operands.lengths, group)

        def compute(wg):
            for piece in range(pieces_of(call) + 1):
                arrive(free(call, piece), wg, 128 + call.loaders)
            arrive(Q_FREE, 0, THREADS + call.loaders)

            def work(*piece):
                Compute(call, codes, shared, wg, tile, *piece).run(outs)

            for_every_piece(bounds, work)
            plgpu.wait_smem_to_gmem(0)

        def load():
            for_every_piece(None, functools.partial(_load, call, operands, shared, tile))

        common.roles(compute, lambda: common.load_with(call.loaders, load))

    out_type = [
        jax.ShapeDtypeStruct((call.parts, call.part_rows, call.rank), jnp.float32),
        jax.ShapeDtypeStruct((call.parts, call.tiles * ROWS), jnp.float32),
        jax.ShapeDtypeStruct((call.batch, 2), jnp.int32),
    ]
    scratch = list(_scratch(call, codes))
    name = "mla_decode_few_rows" if codes is None else "mla_decode_codes"
    run = common.launch(kernel, name, call.groups * call.tiles, out_type, scratch)
    return run(q, q_factor, c_kv, k_rope, c_kv_scale, k_rope_scale, lengths, table)


def _scratch(call, codes) -> Shared:
    pieces, f32 = pieces_of(call), jnp.float32
    kind = jnp.bfloat16 if codes is None else jnp.float16
    tiles = plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(128)
    slots = WARPGROUPS, pieces, ENTRIES, WIDTH
    copies = call.copies(ENTRIES)
    return Shared(
        q=tiled(1, ROWS, call.rank + call.rope, dtype=kind),
        c_kv=tiled(*slots) if codes is None else plgpu.SMEM(slots, jnp.int8, transforms=tiles),
        rope=(
            tiled(WARPGROUPS, ENTRIES, call.rope)
            if codes is None
            else plgpu.SMEM((WARPGROUPS, ENTRIES, call.rope), jnp.int8)
        ),
        # Few arrays: each takes whole kilobytes.
        by_entry=plgpu.SMEM((WARPGROUPS, 3, ENTRIES), f32),
        by_row=plgpu.SMEM((6, 2 * ROWS), f32),  # TMA moves to whole 128 bytes.
        values=None if codes is None else tiled(*slots, dtype=kind),
        weights=tiled(WARPGROUPS, ROWS, ENTRIES, dtype=kind),
        sums=plgpu.SMEM((WIDTH * ROWS,), f32) if codes is None else None,
        q_full=plgpu.Barrier(num_arrivals=1 if codes is None else 2),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=WARPGROUPS * pieces),
        rope_full=plgpu.Barrier(num_arrivals=copies * (1 if codes is None else 3), num_barriers=WARPGROUPS),
    )


def _load(call, operands, shared, tile, b, part, length, first, count):
    """Loads what a piece needs: queries after the first block, as the piece before may still use its own."""
    del part
    rows = pl.ds(tile * ROWS, ROWS)

    def load_queries():
        sync(Q_FREE, 0, THREADS + call.loaders)
        plgpu.copy_gmem_to_smem(operands.q.at[b, rows], shared.q.at[0], shared.q_full)
        if operands.q_factor is not None:
            plgpu.copy_gmem_to_smem(
                operands.q_factor.at[b, rows], shared.by_row.at[Q_FACTOR, ALL_ROWS], shared.q_full
            )

    copies = call.copies(ENTRIES)
    size = ENTRIES // copies

    def places(position):
        """Where the entries from a position on lie: index of a row, and slots."""
        for copy in range(copies):
            start = position + copy * size
            if not call.paged:
                yield b, pl.ds(start, size), pl.ds(copy * size, size)
                continue
            # Beyond the last page of the sequence its last page is read again, and masked.
            page = jnp.minimum(lax.div(start, call.slots), lax.div(length - 1, call.slots))
            yield operands.table[b, page], pl.ds(lax.rem(start, call.slots), size), pl.ds(copy * size, size)

    @pl.loop(0, count)
    def _(number):
        block = first + number * call.stride
        for wg in range(WARPGROUPS):
            found = list(places(block * BLOCK + wg * ENTRIES))
            sync(free(call, pieces_of(call)), wg, 128 + call.loaders)
            full = shared.rope_full.at[wg]
            for row, source, target in found:
                plgpu.copy_gmem_to_smem(operands.k_rope.at[row, source], shared.rope.at[wg, target], full)
                for i, factors in enumerate((operands.c_kv_scale, operands.k_rope_scale)):
                    if factors is not None:
                        plgpu.copy_gmem_to_smem(
                            factors.at[row, source], shared.by_entry.at[wg, i, target], full
                        )
            for piece in range(pieces_of(call)):
                sync(free(call, piece), wg, 128 + call.loaders)
                full = shared.full.at[wg * pieces_of(call) + piece]
                columns = pl.ds(piece * WIDTH, WIDTH)
                for row, source, target in found:
                    plgpu.copy_gmem_to_smem(
                        operands.c_kv.at[row, source, columns], shared.c_kv.at[wg, piece, target], full
                    )
        pl.when(number == 0)(load_queries)

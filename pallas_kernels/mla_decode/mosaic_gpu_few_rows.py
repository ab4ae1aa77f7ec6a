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
from pallas_kernels.mla_attention.mosaic_gpu_common import WARPGROUPS, across, arrive, down, sync, tiled
from pallas_kernels.mla_decode import mosaic_gpu_registers as registers

ROWS = 16  # queries times heads of a tile
ENTRIES = registers.ENTRIES
BLOCK = WARPGROUPS * ENTRIES
WIDTH = registers.CODES  # columns of a piece of the latents
_COMPUTE = WARPGROUPS * 128  # threads
# Weights of a quantised cache, at most 2^_HEADROOM, are float16: only those below 2^(-25 - _HEADROOM) of the
# largest are lost.
_HEADROOM = 15.0
# Below it a factor counts as this; so logarithm and reciprocal are finite.
_LEAST_FACTOR = 2.0**-100

# Hardware barriers; the compiler uses the lower ones. A piece of one warpgroup each, RoPE keys last.
_FREE, _Q_FREE, _PAIR = range(4, 14), range(14, 15), range(15, 16)

_LSE, _Q_FACTOR = 4, 5  # in `_Shared.by_row`
_ROWS = pl.ds(0, ROWS)


class _Operands(typing.NamedTuple):
    q: typing.Any
    q_factor: typing.Any
    c_kv: typing.Any
    k_rope: typing.Any
    c_kv_scale: typing.Any
    k_rope_scale: typing.Any
    lengths: typing.Any
    edges: typing.Any
    table: typing.Any


class _Shared(typing.NamedTuple):
    """Shared memory of a program, and the barriers that its loads complete."""

    q: typing.Any
    c_kv: typing.Any
    values: typing.Any  # converted codes
    weights: typing.Any
    rope: typing.Any
    by_entry: typing.Any  # for each warpgroup the factors of c_KV and k_R, and room for a reduction
    by_row: typing.Any  # peaks and totals of both warpgroups, log-sum-exps, factors of the queries
    sums: typing.Any  # what one warpgroup leaves for the other
    q_full: typing.Any
    full: typing.Any
    rope_full: typing.Any


def split(q, c_kv, k_rope, c_kv_scale, k_rope_scale, lengths, edges, table, *, call):
    """Partial results of all groups, as `mosaic_gpu_split.split` gives them.

    Args:
      q: bf16 `[batch, rows, rank + rope]`, rows whole tiles.
      c_kv: bf16, or codes, `[batch or pages, slots, rank]`.
      k_rope: likewise `[batch or pages, slots, rope]`.
      c_kv_scale, k_rope_scale: float32 factors `[batch or pages, slots]` of codes, not negative; else None.
      lengths: int32 `[batch]`.
      edges: int32 `[groups + 1, 2]`: sequence and block of 128 entries at which a group starts.
      table: int32 `[batch, max_pages]`, or None for a contiguous cache.
      call: what is static.

    Returns:
      float32 outputs `[parts, part_rows, rank]` and log-sum-exps in base 2 `[parts, tiles * 16]`. Group g's
      part of sequence b is number b + g.
    """
    codes = None if c_kv_scale is None else c_kv.dtype
    q_factor = None
    if codes is not None:
        q, q_factor = _half(q, call.rank)
        c_kv, k_rope = (lax.bitcast_convert_type(x, jnp.int8) for x in (c_kv, k_rope))

    def kernel(*refs):
        operands, outs, shared = _Operands(*refs[:9]), refs[9:11], _Shared(*refs[11:])
        program = lax.axis_index("program")
        group, tile = lax.div(program, call.tiles), lax.rem(program, call.tiles)
        first, last = ((operands.edges[group + i, 0], operands.edges[group + i, 1]) for i in range(2))

        def for_every_piece(work):
            """Runs `work(b, length, low, high)` on the blocks of each sequence that this group reads."""

            @pl.loop(first[0], jnp.minimum(last[0], call.batch - 1) + 1)
            def _(b):
                length = operands.lengths[b]
                low = jnp.where(b == first[0], first[1], 0)
                high = jnp.where(b == last[0], last[1], lax.div(length + BLOCK - 1, BLOCK))
                pl.when(low < high)(lambda: work(b, length, low, high))

        def compute(wg):
            for piece in range(_pieces(call) + 1):
                arrive(_free(call, piece), wg, 128 + call.loaders)
            arrive(_Q_FREE, 0, _COMPUTE + call.loaders)
            for_every_piece(lambda *piece: _Compute(call, codes, shared, wg, tile, group, *piece).run(outs))
            plgpu.wait_smem_to_gmem(0)

        def load():
            for_every_piece(functools.partial(_load, call, operands, shared, tile))

        common.roles(compute, lambda: common.load_with(call.loaders, load))

    out_type = [
        jax.ShapeDtypeStruct((call.parts, call.part_rows, call.rank), jnp.float32),
        jax.ShapeDtypeStruct((call.parts, call.tiles * ROWS), jnp.float32),
    ]
    scratch = list(_scratch(call, codes))
    name = "mla_decode_few_rows" if codes is None else "mla_decode_codes"
    run = common.launch(kernel, name, call.groups * call.tiles, out_type, scratch)
    return run(q, q_factor, c_kv, k_rope, c_kv_scale, k_rope_scale, lengths, edges, table)


def _half(q, rank):
    """Queries in float16, in the order of columns of converted codes, and each row's factor."""
    q = q.astype(jnp.float32)
    largest = lax.bitcast_convert_type(jnp.max(jnp.abs(q), -1), jnp.int32)
    power = lax.bitcast_convert_type(largest & 0x7F800000, jnp.float32)  # of 2, at most the largest
    factor = jnp.clip(power, 2.0**-100, 2.0**100) * 2.0**-10
    q = registers.column_order((q / factor[..., None]).astype(jnp.float16))
    return q, factor


def _pieces(call) -> int:
    return call.rank // WIDTH


def _free(call, piece):
    """Barriers on which the two warpgroups announce that a piece may be loaded again; number `_pieces` is the
    RoPE keys'."""
    return tuple(_FREE[wg * (_pieces(call) + 1) + piece] for wg in range(WARPGROUPS))


def _scratch(call, codes) -> _Shared:
    pieces, f32 = _pieces(call), jnp.float32
    kind = jnp.bfloat16 if codes is None else jnp.float16
    tiles = plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(128)
    slots = WARPGROUPS, pieces, ENTRIES, WIDTH
    copies = call.copies(ENTRIES)
    return _Shared(
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


def _load(call, operands, shared, tile, b, length, low, high):
    """Loads what a piece needs."""
    sync(_Q_FREE, 0, _COMPUTE + call.loaders)
    rows = pl.ds(tile * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(operands.q.at[b, rows], shared.q.at[0], shared.q_full)
    if operands.q_factor is not None:
        plgpu.copy_gmem_to_smem(
            operands.q_factor.at[b, rows], shared.by_row.at[_Q_FACTOR, _ROWS], shared.q_full
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

    @pl.loop(low, high)
    def _(block):
        for wg in range(WARPGROUPS):
            found = list(places(block * BLOCK + wg * ENTRIES))
            sync(_free(call, _pieces(call)), wg, 128 + call.loaders)
            full = shared.rope_full.at[wg]
            for row, source, target in found:
                plgpu.copy_gmem_to_smem(operands.k_rope.at[row, source], shared.rope.at[wg, target], full)
                for i, factors in enumerate((operands.c_kv_scale, operands.k_rope_scale)):
                    if factors is not None:
                        plgpu.copy_gmem_to_smem(
                            factors.at[row, source], shared.by_entry.at[wg, i, target], full
                        )
            for piece in range(_pieces(call)):
                sync(_free(call, piece), wg, 128 + call.loaders)
                full = shared.full.at[wg * _pieces(call) + piece]
                columns = pl.ds(piece * WIDTH, WIDTH)
                for row, source, target in found:
                    plgpu.copy_gmem_to_smem(
                        operands.c_kv.at[row, source, columns], shared.c_kv.at[wg, piece, target], full
                    )


class _Compute:
    """A compute warpgroup's share of a piece: every second 64 entries."""

    def __init__(self, call, codes, shared, wg, tile, group, b, length, low, high):
        self.call, self.codes, self.shared, self.wg, self.tile = call, codes, shared, wg, tile
        self.part, self.length, self.low, self.high = b + group, length, low, high

    def run(self, outs):
        accumulators = [plgpu.ACC((WIDTH, ROWS)) for _ in range(_pieces(self.call))]
        self.store(outs, *pl.run_scoped(self.accumulate, *accumulators))

    def accumulate(self, *out):
        """The maximum of the logits in base 2, the weights added up by row of S^T, and O^T."""
        call = self.call
        plgpu.barrier_wait(self.shared.q_full)
        carry = (
            plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), common.PER_COLUMN),
            plgpu.layout_cast(jnp.zeros((ENTRIES, ROWS), jnp.float32), common.MATRIX),
            self.wg,
        )
        zero = common.runtime_zero()
        # Blocks that every query sees whole.
        whole = lax.clamp(self.low, lax.div(jnp.maximum(self.length - call.s_q + 1, 0), BLOCK), self.high)
        for begin, end, masked in ((self.low, whole, False), (whole, self.high, True)):
            step = functools.partial(self.step, zero=zero, out=out, masked=masked)
            carry = lax.fori_loop(begin, end, step, carry)
        arrive(_Q_FREE, 0, _COMPUTE + call.loaders)
        return *carry[:2], *(plgpu.wgmma_accumulator_load(acc, wait_n=0) for acc in out)

    def step(self, block, carry, *, zero, out, masked):
        """Adds 64 entries to the accumulators."""
        call, shared = self.call, self.shared
        peak, total, wg = carry
        accumulator = plgpu.ACC((ENTRIES, ROWS), jnp.float32)
        if self.codes is None:
            s = pl.run_scoped(functools.partial(self.scores, wg), accumulator) * (call.scale * common.LOG2E)
            headroom = 0.0
        else:
            scores = functools.partial(self.scores_of_codes, wg)
            s, inverse = pl.run_scoped(scores, accumulator, accumulator)
            headroom = _HEADROOM
        if masked:
            s = jnp.where(self.visible(block), s, -jnp.inf)
        new_peak = jnp.maximum(peak, registers.over_rows(s, shared.by_entry.at[wg, 2], "max") - headroom)
        # A query that has seen nothing keeps -inf: subtract 0 there, so that no NaN arises.
        below = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
        weights = jnp.exp2(s - down(below, ENTRIES))
        factor = jnp.exp2(peak - below)
        found = weights if self.codes is None else weights * across(inverse, ROWS)
        total = total * down(factor, ENTRIES) + found
        registers.store_weights(shared.weights.at[wg], weights, self.codes is not None)
        plgpu.commit_smem()
        for acc in out:
            acc[...] = plgpu.wgmma_accumulator_load(acc, wait_n=None) * down(factor, WIDTH)
        values = shared.c_kv if self.codes is None else shared.values
        for piece, acc in enumerate(out):
            columns = values.at[wg, piece].transpose((1, 0))
            plgpu.wgmma(acc, columns, shared.weights.at[wg].transpose((1, 0)))
        if self.codes is None:
            for piece in range(len(out)):
                plgpu.wgmma_wait(len(out) - 1 - piece)
                self.release(piece)
        else:
            plgpu.wgmma_wait(0)
        return new_peak, total, wg + zero

    def release(self, piece):
        arrive(_free(self.call, piece), self.wg, 128 + self.call.loaders)

    def scores(self, wg, acc):
        """S^T of 64 entries in bf16."""
        call, shared = self.call, self.shared
        pieces = _pieces(call)
        plgpu.barrier_wait(shared.rope_full.at[wg])
        plgpu.wgmma(acc, shared.rope.at[wg], self.queries(wg, call.rank, call.rope))
        for piece in range(pieces):
            plgpu.barrier_wait(shared.full.at[wg * pieces + piece])
            plgpu.wgmma(acc, shared.c_kv.at[wg, piece], self.queries(wg, piece * WIDTH, WIDTH))
        plgpu.wgmma_wait(pieces)
        self.release(pieces)
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    def queries(self, wg, start, width):
        # The index is 0; from a number that the compiler does not know, as `common.runtime_zero` says.
        return self.shared.q.at[wg - self.wg, :, pl.ds(start, width)].transpose((1, 0))

    def scores_of_codes(self, wg, latent, rope):
        """Logits of 64 entries in base 2, plus their factors' as values; these factors' reciprocals."""
        call, shared = self.call, self.shared
        pieces = _pieces(call)
        plgpu.barrier_wait(shared.rope_full.at[wg])
        factor, rope_factor = (registers.per_entry(shared.by_entry.at[wg, i]) for i in range(2))
        (operand,) = registers.convert(shared.rope.at[wg], None, self.codes)
        self.release(pieces)
        plgpu.wgmma(rope, operand, self.queries(wg, call.rank, call.rope))
        for piece in range(pieces):
            plgpu.barrier_wait(shared.full.at[wg * pieces + piece])
            operands = registers.convert(shared.c_kv.at[wg, piece], shared.values.at[wg, piece], self.codes)
            self.release(piece)
            for i, operand in enumerate(operands):
                plgpu.wgmma(latent, operand, self.queries(wg, piece * WIDTH + 64 * i, 64))
            # The registers of the operands before these are free again.
            plgpu.wgmma_wait(2)
        rope = plgpu.wgmma_accumulator_load(rope, wait_n=0)
        latent = plgpu.wgmma_accumulator_load(latent, wait_n=0)
        q_factor = plgpu.load(shared.by_row.at[_Q_FACTOR, _ROWS], layout=common.PER_COLUMN, optimized=False)
        q_factor = down(q_factor * (call.scale * common.LOG2E), ENTRIES)
        logits = (latent * across(factor, ROWS) + rope * across(rope_factor, ROWS)) * q_factor
        factor = jnp.maximum(factor, _LEAST_FACTOR)
        return logits + across(jnp.log2(factor), ROWS), 1 / factor

    def visible(self, block):
        """Which of 64 entries (rows) a query (column) sees."""
        call = self.call
        entry = plgpu.broadcasted_iota(jnp.int32, (ENTRIES,), 0, layout=common.PER_ROW)
        if self.codes is not None:
            entry = registers.entry_of_row(entry)
        last = self.length - call.s_q - block * BLOCK - self.wg * ENTRIES
        limit = plgpu.layout_cast(jnp.full((ROWS,), last, jnp.int32), common.PER_COLUMN)
        if call.s_q > 1:
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=common.PER_COLUMN)
            limit += (column + self.tile * ROWS) // call.heads
        return across(entry, ROWS) <= down(limit, ENTRIES)

    def store(self, outs, peak, total, *values):
        """Adds up both warpgroups' results and writes them as a part."""
        out, lse = outs
        shared, wg = self.shared, self.wg
        total = registers.over_rows(total, shared.by_entry.at[wg, 2], "add")
        shared.by_row[wg, _ROWS], shared.by_row[2 + wg, _ROWS] = peak, total
        sync(_PAIR, 0, _COMPUTE)
        their_peak, their_total = (
            plgpu.load(shared.by_row.at[i + 1 - wg, _ROWS], layout=common.PER_COLUMN, optimized=False)
            for i in (0, 2)
        )
        both = jnp.maximum(peak, their_peak)
        below = jnp.where(both == -jnp.inf, 0.0, both)
        factor = jnp.exp2(peak - below)
        total = total * factor + their_total * jnp.exp2(their_peak - below)
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        factor = down(jnp.where(seen, factor / safe, 0.0), WIDTH)
        # The converted codes of the warpgroup that leaves its sums there are not needed any more.
        sums = shared.values.at[1, 0] if shared.sums is None else shared.sums
        for piece, value in enumerate(values):
            value *= factor
            pl.when(wg == 1)(lambda value=value: registers.put(sums, value))
            sync(_PAIR, 0, _COMPUTE)

            @pl.when(wg == 0)
            def _(value=value, piece=piece):
                value = registers.take(sums, value)
                registers.store_columns(out.at[self.part], value, self.tile * ROWS, piece * WIDTH)

            sync(_PAIR, 0, _COMPUTE)

        @pl.when(wg == 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared.by_row[_LSE, _ROWS] = jnp.where(seen, both + jnp.log2(safe), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                shared.by_row.at[_LSE, _ROWS], lse.at[self.part, pl.ds(self.tile * ROWS, ROWS)]
            )

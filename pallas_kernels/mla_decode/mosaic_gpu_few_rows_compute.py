"""What the compute warpgroups of `mosaic_gpu_few_rows` do, and the memory and barriers that they share."""

import functools
import typing

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import mosaic_gpu_common as common
from pallas_kernels.mla_attention.mosaic_gpu_common import WARPGROUPS, across, arrive, down, sync
from pallas_kernels.mla_decode import mosaic_gpu_registers as registers
from pallas_kernels.mla_decode.mosaic_gpu_pieces import BLOCK, seen_whole

ROWS = 16  # queries times heads of a tile
ENTRIES = registers.ENTRIES
WIDTH = registers.CODES  # columns of a piece of the latents
THREADS = WARPGROUPS * 128  # that compute
# Weights of a quantised cache, at most 2^_HEADROOM, are float16: only those below 2^(-25 - _HEADROOM) of the
# largest are lost.
_HEADROOM = 15.0
# Below it a factor counts as this; so logarithm and reciprocal are finite.
_LEAST_FACTOR = 2.0**-100

# Hardware barriers; the compiler uses the lower ones. A piece of one warpgroup each, RoPE keys last.
FREE, Q_FREE, _PAIR = range(4, 14), range(14, 15), range(15, 16)

_LSE, Q_FACTOR = 4, 5  # in `Shared.by_row`
ALL_ROWS = pl.ds(0, ROWS)


class Shared(typing.NamedTuple):
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


def pieces_of(call) -> int:
    return call.rank // WIDTH


def free(call, piece):
    """Barriers on which the two warpgroups announce that a piece may be loaded again, RoPE keys last."""
    return tuple(FREE[wg * (pieces_of(call) + 1) + piece] for wg in range(WARPGROUPS))


class Compute:
    """A compute warpgroup's share of a piece: every second 64 entries."""

    def __init__(self, call, codes, shared, wg, tile, b, part, length, first, count):
        del b
        self.call, self.codes, self.shared, self.wg, self.tile = call, codes, shared, wg, tile
        self.part, self.length, self.first, self.count = part, length, first, count

    def run(self, outs):
        accumulators = [plgpu.ACC((WIDTH, ROWS)) for _ in range(pieces_of(self.call))]
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
        whole = seen_whole(call, self.length, self.first, self.count)
        for begin, end, masked in ((0, whole, False), (whole, self.count, True)):
            step = functools.partial(self.step, zero=zero, out=out, masked=masked)
            carry = lax.fori_loop(begin, end, step, carry)
        arrive(Q_FREE, 0, THREADS + call.loaders)
        return *carry[:2], *(plgpu.wgmma_accumulator_load(acc, wait_n=0) for acc in out)

    def step(self, i, carry, *, zero, out, masked):
        """Adds 64 entries to the accumulators."""
        call, shared = self.call, self.shared
        block = self.first + i * call.stride
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
        arrive(free(self.call, piece), self.wg, 128 + self.call.loaders)

    def scores(self, wg, acc):
        """S^T of 64 entries in bf16."""
        call, shared = self.call, self.shared
        pieces = pieces_of(call)
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
        pieces = pieces_of(call)
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
        q_factor = plgpu.load(shared.by_row.at[Q_FACTOR, ALL_ROWS], layout=common.PER_COLUMN, optimized=False)
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
        shared.by_row[wg, ALL_ROWS], shared.by_row[2 + wg, ALL_ROWS] = peak, total
        sync(_PAIR, 0, THREADS)
        their_peak, their_total = (
            plgpu.load(shared.by_row.at[i + 1 - wg, ALL_ROWS], layout=common.PER_COLUMN, optimized=False)
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
            sync(_PAIR, 0, THREADS)

            @pl.when(wg == 0)
            def _(value=value, piece=piece):
                value = registers.take(sums, value)
                registers.store_columns(out.at[self.part], value, self.tile * ROWS, piece * WIDTH)

            sync(_PAIR, 0, THREADS)

        @pl.when(wg == 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared.by_row[_LSE, ALL_ROWS] = jnp.where(seen, both + jnp.log2(safe), -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                shared.by_row.at[_LSE, ALL_ROWS], lse.at[self.part, pl.ds(self.tile * ROWS, ROWS)]
            )

"""Forward attention for Hopper in Pallas Mosaic GPU: one persistent kernel.

Two compute warpgroups own 64 query rows each; one warp of a third issues the TMA loads of key and value
blocks into `stages` slots. The compute warpgroups alternate (FlashAttention-3, Shah et al. 2024, §3.1): while
one is at its products, `O += P V` of block j and `S = Q K^T` of block j + 1 back to back (bf16 operands, P
from registers, float32 accumulators), the other is at its softmax.

A program walks over (head, query tile) pairs, the longest first within groups of heads whose keys and values
fit in the L2 cache. Blocks of keys outside a tile's visible range are skipped; only those not wholly visible
are masked.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import mosaic_gpu_common as common
from pallas_kernels.mla_attention.mosaic_gpu_call import deal, deal_by_ranges
from pallas_kernels.mla_attention.mosaic_gpu_common import ROWS, TILE, WARPGROUPS, across, arrive, sync, tiled

# Hardware barriers; the compiler uses the lower ones.
_TURN, _Q_FREE, _K_FREE, _V_FREE = range(4, 6), range(6, 7), range(7, 11), range(11, 15)
_COMPUTE = WARPGROUPS * 128  # threads


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the forward kernel.

    Attributes:
      block_kv: keys of a block, a multiple of 64.
      stages: blocks of keys, and of values, in shared memory.
    """

    block_kv: int = 128
    stages: int = 2

    def shared_memory(self, d_qk: int, d_v: int) -> int:
        """Bytes of shared memory the kernel asks for."""
        return 2 * (TILE * (d_qk + 64) + self.stages * self.block_kv * (d_qk + d_v)) + 2048


def default_config(d_qk: int, d_v: int) -> Config:
    """The tiles for these head widths."""
    config = Config()
    return config if config.shared_memory(d_qk, d_v) <= common.SHARED_MEMORY else Config(block_kv=64)


class _Operands(typing.NamedTuple):
    q: typing.Any
    k: typing.Any
    v: typing.Any
    k_rope: typing.Any
    q_segments: typing.Any
    kv_segments: typing.Any
    ranges: typing.Any
    hands: typing.Any


class _Shared(typing.NamedTuple):
    """Shared memory of a program, and the barriers that its loads complete."""

    q: typing.Any
    k: typing.Any
    k_rope: typing.Any
    v: typing.Any
    out: typing.Any
    lse: typing.Any
    q_full: typing.Any
    k_full: typing.Any
    v_full: typing.Any


def forward(q, k, v, k_rope, q_segments, kv_segments, ranges, *, call, config, multiprocessors):
    """Attention over operands padded to whole TMA boxes.

    Args:
      q: bf16 `[batch, q_len, heads, d_qk]`, q_len a multiple of 8.
      k: bf16 `[batch, kv_len, kv_heads, d_k]`, kv_len a multiple of 8; so are those of v and k_rope.
      v: bf16 `[batch, kv_len, kv_heads, d_v]`.
      k_rope: bf16 `[batch, kv_len, d_qk - d_k]`, or None where d_k is d_qk.
      q_segments: int32 `[batch, rows of whole tiles]`, or None.
      kv_segments: int32 `[batch, columns of whole blocks]`, or None.
      ranges: int32 `[batch, q tiles, 4]`, `Call.key_blocks` of every tile, or None without segments.
      call: what is static.
      config: the tiles.
      multiprocessors: how many the GPU has; each runs one program.

    Returns:
      The output `[batch, q_len, heads, d_v]`; the float32 log-sum-exp `[batch, heads, rows of whole tiles]`.
    """
    stages, block_kv = config.stages, config.block_kv
    tiles = call.batch * call.heads * call.q_tiles
    programs = min(multiprocessors, tiles)
    if ranges is None:
        hands = jnp.asarray(deal(call, programs, block_kv, False))
    else:
        hands = deal_by_ranges(call, programs, block_kv, ranges)

    def kernel(*refs):
        operands, outs, shared = _Operands(*refs[:8]), refs[8:10], _Shared(*refs[10:])
        hand = operands.hands.at[lax.axis_index("program")]

        def for_every_tile(work):
            """Runs `work(i, tile, blocks, step)`, which returns the next step, on each tile dealt to us."""

            def locate(index):
                return call.locate(index, call.heads, call.q_tiles, call.kv_len, not call.causal)

            def blocks_of(tile):
                return call.key_blocks(ranges, tile[0], tile[2], block_kv)

            def body(i, carry):
                # What device memory says of a tile is read a tile ahead: it takes as long as a block of keys.
                step, index, following, blocks = carry
                after = hand[i + 3]
                tile = locate(index)
                if ranges is None:
                    return work(i, tile, blocks_of(tile), step), following, after, ()
                next_blocks = blocks_of(locate(following))
                return work(i, tile, blocks, step), following, after, next_blocks

            ranges = operands.ranges
            blocks = () if ranges is None else blocks_of(locate(hand[1]))
            lax.fori_loop(0, hand[0], body, (jnp.int32(0), hand[1], hand[2], blocks))

        def compute(wg):
            pl.when(wg == 1)(lambda: arrive(_TURN, 0, _COMPUTE))
            for slot in range(stages):
                arrive(_K_FREE, slot, call.with_loader)
                arrive(_V_FREE, slot, call.with_loader)

            for_every_tile(lambda _, *work: _Compute(call, config, operands, shared, wg, *work).run(outs))
            plgpu.wait_smem_to_gmem(0)

        def load():
            for_every_tile(functools.partial(_load, call, config, operands, shared))

        common.roles(compute, load)

    k_rope_tile = None if k_rope is None else tiled(stages, block_kv, call.d_qk - call.d_k)
    scratch = _Shared(
        q=tiled(TILE, call.d_qk),
        k=tiled(stages, block_kv, call.d_k),
        k_rope=k_rope_tile,
        v=tiled(stages, block_kv, call.d_v),
        out=tiled(WARPGROUPS, ROWS, 64),
        lse=plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        q_full=plgpu.Barrier(),
        k_full=plgpu.Barrier(num_arrivals=1 if k_rope is None else 2, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
    )
    out_type = [
        jax.ShapeDtypeStruct((*q.shape[:3], call.d_v), jnp.bfloat16),
        jax.ShapeDtypeStruct((call.batch, call.heads, call.q_tiles * TILE), jnp.float32),
    ]
    run = common.launch(kernel, "mla_attention_forward", programs, out_type, list(scratch))
    return run(q, k, v, k_rope, q_segments, kv_segments, ranges, hands)


def _load(call, config, operands, shared, i, tile, blocks, step):
    """Loads what a tile needs; returns the number of blocks loaded so far."""
    q, k, v, k_rope, *_ = operands
    stages, size = config.stages, config.block_kv
    row, head, q_tile = tile
    first, _, _, last = blocks
    kv_head = lax.div(head, call.group)

    def body():
        @pl.loop(first, last)
        def _(j):
            slot = lax.rem(step + j - first, stages)
            keys = pl.ds(j * size, size)
            sync(_K_FREE[:stages], slot, call.with_loader)
            plgpu.copy_gmem_to_smem(k.at[row, keys, kv_head], shared.k.at[slot], shared.k_full.at[slot])
            if k_rope is not None:
                plgpu.copy_gmem_to_smem(k_rope.at[row, keys], shared.k_rope.at[slot], shared.k_full.at[slot])

            @pl.when(j == first)
            def _():
                pl.when(i > 0)(lambda: sync(_Q_FREE, 0, call.with_loader))
                rows = pl.ds(q_tile * TILE, TILE)
                plgpu.copy_gmem_to_smem(q.at[row, rows, head], shared.q, shared.q_full)

            sync(_V_FREE[:stages], slot, call.with_loader)
            plgpu.copy_gmem_to_smem(v.at[row, keys, kv_head], shared.v.at[slot], shared.v_full.at[slot])

    common.load_with(call.loaders, body)
    return step + last - first


class _Compute:
    """A compute warpgroup's 64 rows of a tile."""

    def __init__(self, call, config, operands, shared, wg, tile, blocks, step):
        """`step` counts the blocks of the tiles before."""
        self.call, self.config, self.operands, self.shared = call, config, operands, shared
        self.wg, self.blocks, self.step = wg, blocks, step
        self.row, self.head, q_tile = tile
        self.first, *_, self.last = self.blocks
        self.base = q_tile * TILE + wg * ROWS
        self.segments = None
        if operands.q_segments is not None:
            self.segments = common.per_row(operands.q_segments.at[self.row, pl.ds(self.base, ROWS)])

    def run(self, outs):
        """Writes the rows' results; returns the number of blocks used so far."""
        self.store(outs, *pl.run_scoped(self.accumulate, plgpu.ACC((ROWS, self.call.d_v))))
        return self.step + self.last - self.first

    def slot(self, j):
        return lax.rem(self.step + j - self.first, self.config.stages)

    def accumulate(self, out):
        """The sum of weighted values, the maximum of the logits in base 2 and the sum of the weights."""
        first, last = self.first, self.last
        s = pl.run_scoped(lambda acc: self.products(acc, first), self._scores())
        peak = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), common.PER_ROW)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), common.PER_ROW)
        _, whole_first, whole_last, _ = self.blocks
        if self.operands.ranges is None:
            s = self.masked(s, first)
        else:  # Reading ids takes long, and of one document the first block is seen whole.
            whole = (first >= whole_first) & (first < whole_last)
            s = lax.cond(whole, lambda s: s, lambda s: self.masked(s, first), s)
        *carry, _ = self.softmax(s, peak, total, True)

        def body(j, carry, some_masked):
            weights, peak, total = carry
            j = j if self.operands.ranges is None else common.uniform(j)
            s = pl.run_scoped(lambda acc: self.products(acc, j, out, weights), self._scores())
            s = self.masked(s, j) if some_masked else s
            weights, peak, total, factor = self.softmax(s, peak, total, some_masked)
            out[...] = plgpu.wgmma_accumulator_load(out, wait_n=None) * across(factor, self.call.d_v)
            return weights, peak, total

        start = first + 1
        for end, some_masked in ((whole_first, True), (whole_last, False), (last, True)):
            if end is whole_first and self.operands.ranges is None:
                continue  # Without segments the first blocks are wholly visible.
            end = lax.clamp(start, jnp.int32(end), last)
            carry = lax.fori_loop(start, end, functools.partial(body, some_masked=some_masked), tuple(carry))
            start = end
        weights, peak, total = carry
        plgpu.barrier_wait(self.shared.v_full.at[self.slot(last - 1)])
        sync(_TURN, self.wg, _COMPUTE)
        plgpu.wgmma(out, weights, self.shared.v.at[self.slot(last - 1)])
        arrive(_TURN, 1 - self.wg, _COMPUTE)
        values = plgpu.wgmma_accumulator_load(out, wait_n=0)
        self.release_values(last - 1)
        return values, peak, total

    def products(self, acc, j, out=None, weights=None):
        """In this warpgroup's turn, adds the weighted values of block j - 1 and computes the scores of j."""
        shared = self.shared
        if out is None:
            plgpu.barrier_wait(shared.q_full)
        else:
            plgpu.barrier_wait(shared.v_full.at[self.slot(j - 1)])
        plgpu.barrier_wait(shared.k_full.at[self.slot(j)])
        sync(_TURN, self.wg, _COMPUTE)
        if out is not None:
            plgpu.wgmma(out, weights, shared.v.at[self.slot(j - 1)])
        rows, d_k = shared.q.at[pl.ds(self.wg * ROWS, ROWS)], self.call.d_k
        keys = shared.k.at[self.slot(j)].transpose((1, 0))
        if shared.k_rope is None:
            plgpu.wgmma(acc, rows, keys)
        else:
            plgpu.wgmma(acc, rows.at[:, pl.ds(0, d_k)], keys)
            rope = rows.at[:, pl.ds(d_k, self.call.d_qk - d_k)]
            plgpu.wgmma(acc, rope, shared.k_rope.at[self.slot(j)].transpose((1, 0)))
        arrive(_TURN, 1 - self.wg, _COMPUTE)
        if out is not None:
            plgpu.wgmma_wait(1 if shared.k_rope is None else 2)
            self.release_values(j - 1)
        s = plgpu.wgmma_accumulator_load(acc, wait_n=0)
        arrive(_K_FREE[: self.config.stages], self.slot(j), self.call.with_loader)
        pl.when(j == self.last - 1)(lambda: arrive(_Q_FREE, 0, self.call.with_loader))
        return s

    def release_values(self, j):
        arrive(_V_FREE[: self.config.stages], self.slot(j), self.call.with_loader)

    def masked(self, s, j):
        first_key = j * self.config.block_kv
        keys = pl.ds(first_key, self.config.block_kv)

        def segments():
            return common.per_column(self.operands.kv_segments.at[self.row, keys])

        return common.hide_keys(s, self.call, self.base, first_key, self.segments, segments)

    def softmax(self, s, peak, total, some_masked):
        """Weights 2^(c s - peak) of a block, the new maximum and sum, and the factor of what came before."""
        exponent_scale = self.call.scale * common.LOG2E
        new_peak = jnp.maximum(peak, s.max(axis=1) * exponent_scale)
        # A row that has seen nothing keeps -inf: subtract 0 there, so that no NaN arises.
        below = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if some_masked else new_peak
        weights = jnp.exp2(s * exponent_scale - across(below, s.shape[1]))
        factor = jnp.exp2(peak - below)
        return weights.astype(jnp.bfloat16), new_peak, total * factor + weights.sum(axis=1), factor

    def store(self, outs, values, peak, total):
        """Writes the output, 64 columns at a time, and the log-sum-exp."""
        out, lse = outs
        seen = total > 0
        safe = jnp.where(seen, total, 1.0)
        values *= across(jnp.where(seen, 1 / safe, 0.0), self.call.d_v)
        rows, mine = pl.ds(self.base, ROWS), self.shared.out.at[self.wg]
        for start in range(0, self.call.d_v, 64):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mine[...] = values[:, start : start + 64].astype(jnp.bfloat16)
            if start == 0:
                self.shared.lse[self.wg] = jnp.where(seen, (peak + jnp.log2(safe)) / common.LOG2E, -jnp.inf)
            plgpu.commit_smem()
            columns = out.at[self.row, rows, self.head, pl.ds(start, 64)]
            plgpu.copy_smem_to_gmem(mine, columns, commit_group=False)
            if start == 0:
                lse_rows = lse.at[self.row, self.head, rows]
                plgpu.copy_smem_to_gmem(self.shared.lse.at[self.wg], lse_rows, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

    def _scores(self):
        return plgpu.ACC((ROWS, self.config.block_kv), jnp.float32)

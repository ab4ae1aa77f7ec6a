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

from pallas_kernels.mla_attention.mosaic_gpu_common import (
    LOG2E,
    PER_COLUMN,
    PER_ROW,
    SHARED_MEMORY,
    across,
    arrive,
    down,
    keep_columns,
    row_numbers,
    sync,
    tiled,
)

WARPGROUPS = 2  # that compute
ROWS = 64  # query rows of a compute warpgroup
TILE_Q = WARPGROUPS * ROWS

# Hardware barriers; the compiler uses the lower ones. A free slot is announced by 256 threads to a warp.
_TURN, _Q_FREE, _K_FREE, _V_FREE = range(4, 6), range(6, 7), range(7, 11), range(11, 15)
_ALL, _WITH_LOADER = WARPGROUPS * 128, WARPGROUPS * 128 + 32


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the forward kernel.

    Attributes:
      block_kv: keys of a block, a multiple of 64.
      stages: blocks of keys, and of values, in shared memory.
      scores_first: within a turn, whether `Q K^T` comes before `P V`.
      l2_bytes: keys and values walked over together.
    """

    block_kv: int = 128
    stages: int = 2
    scores_first: bool = False
    l2_bytes: int = 24 * 2**20

    def shared_memory(self, d_qk: int, d_v: int) -> int:
        """Bytes of shared memory the kernel asks for."""
        return 2 * (TILE_Q * (d_qk + 64) + self.stages * self.block_kv * (d_qk + d_v)) + 2048


def default_config(d_qk: int, d_v: int) -> Config:
    """The tiles for these head widths."""
    config = Config()
    return config if config.shared_memory(d_qk, d_v) <= SHARED_MEMORY else Config(block_kv=64)


class Call(typing.NamedTuple):
    """What is static in one call."""

    batch: int
    heads: int
    kv_heads: int
    q_tiles: int
    kv_len: int  # keys that exist; the operand may be padded
    offset: int  # kv_len - q_len: query i sees keys up to i + offset
    causal: bool
    scale: float
    d_k: int  # width of the keys that each head has to itself
    d_qk: int
    d_v: int
    config: Config

    @property
    def together(self) -> int:
        """Heads walked over together: their keys and values should stay in the L2 cache."""
        pairs = self.batch * self.heads
        together = max(1, min(pairs, self.config.l2_bytes // (2 * self.kv_len * (self.d_qk + self.d_v))))
        return next(n for n in range(together, 0, -1) if pairs % n == 0)

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.q_tiles

    def tile(self, index):
        """Batch row, head and query tile of a work item."""
        group = lax.div(index, self.together * self.q_tiles)
        within = lax.rem(index, self.together * self.q_tiles)
        rank, member = lax.div(within, self.together), lax.rem(within, self.together)
        pair = group * self.together + member
        q_tile = self.q_tiles - 1 - rank if self.causal else rank
        return lax.div(pair, self.heads), lax.rem(pair, self.heads), q_tile

    def blocks(self, ranges, row, q_tile):
        """Key blocks to visit: (first, first of the wholly visible, end of those, end)."""
        if ranges is not None:
            return tuple(ranges[row, q_tile, i] for i in range(4))
        size = self.config.block_kv
        count, whole = -(-self.kv_len // size), self.kv_len // size
        if not self.causal:
            return jnp.int32(0), 0, whole, jnp.int32(count)
        seen = q_tile * TILE_Q + self.offset + 1  # Keys that the tile's first query sees.
        last = lax.clamp(1, lax.div(seen + TILE_Q + size - 2, size), count)
        return jnp.int32(0), 0, lax.clamp(0, lax.div(seen, size), min(whole, count)), last


def forward(q, k, v, k_rope, q_segments, kv_segments, ranges, *, call, multiprocessors):
    """Attention over operands padded to whole TMA boxes.

    Args:
      q: bf16 `[batch, q_len, heads, d_qk]`, q_len a multiple of 8.
      k: bf16 `[batch, kv_len, kv_heads, d_k]`, kv_len a multiple of 8; so are those of v and k_rope.
      v: bf16 `[batch, kv_len, kv_heads, d_v]`.
      k_rope: bf16 `[batch, kv_len, d_qk - d_k]`, or None where d_k is d_qk.
      q_segments: int32 `[batch, rows of whole tiles]`, or None.
      kv_segments: int32 `[batch, columns of whole blocks]`, or None.
      ranges: int32 `[batch, q tiles, 4]`, `Call.blocks` of every query tile, or None without segments.
      call: what is static.
      multiprocessors: how many the GPU has; each runs one program.

    Returns:
      The output `[batch, q_len, heads, d_v]`, and the float32 log-sum-exp `[batch, heads, rows of whole tiles]`.
    """
    stages, block_kv = call.config.stages, call.config.block_kv
    programs = min(multiprocessors, call.tiles)

    def kernel(*refs):
        operands, outs, shared = refs[:7], refs[7:9], _Shared(*refs[9:])
        wg = lax.axis_index("wg")
        first_tile = lax.axis_index("program")
        count = lax.div(call.tiles - first_tile + programs - 1, programs)

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            pl.when(wg == 1)(lambda: arrive(_TURN, 0, _ALL))
            for slot in range(stages):
                arrive(_K_FREE, slot, _WITH_LOADER)
                arrive(_V_FREE, slot, _WITH_LOADER)

            def body(i, step):
                tile = call.tile(first_tile + i * programs)
                return _compute(call, operands, outs, shared, wg, tile, step)

            lax.fori_loop(0, count, body, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def body(i, step):
                return _load(call, operands, shared, i, call.tile(first_tile + i * programs), step)

            lax.fori_loop(0, count, body, jnp.int32(0))

    rope = None if k_rope is None else tiled(stages, block_kv, call.d_qk - call.d_k)
    scratch = _Shared(
        q=tiled(TILE_Q, call.d_qk),
        k=tiled(stages, block_kv, call.d_k),
        rope=rope,
        v=tiled(stages, block_kv, call.d_v),
        out=tiled(WARPGROUPS, ROWS, 64),
        lse=plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        q_full=plgpu.Barrier(),
        k_full=plgpu.Barrier(num_arrivals=1 if rope is None else 2, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
    )
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:3], call.d_v), jnp.bfloat16),
            jax.ShapeDtypeStruct((call.batch, call.heads, call.q_tiles * TILE_Q), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="mla_attention_forward",
    )(q, k, v, k_rope, q_segments, kv_segments, ranges)


class _Shared(typing.NamedTuple):
    """Shared memory of a program, and the barriers that its loads complete."""

    q: typing.Any
    k: typing.Any
    rope: typing.Any
    v: typing.Any
    out: typing.Any
    lse: typing.Any
    q_full: typing.Any
    k_full: typing.Any
    v_full: typing.Any


def _load(call, operands, shared, i, tile, step):
    """One warp loads what a tile needs; returns the number of blocks loaded so far."""
    q, k, v, rope, _, _, ranges = operands
    stages, size = call.config.stages, call.config.block_kv
    row, head, q_tile = tile
    first, _, _, last = call.blocks(ranges, row, q_tile)
    kv_head = lax.div(head, call.heads // call.kv_heads)

    @plgpu.warp_map
    def _(warp):
        @pl.when(warp == 0)
        def _():
            @pl.loop(first, last)
            def _(j):
                slot = lax.rem(step + j - first, stages)
                keys = pl.ds(j * size, size)
                sync(_K_FREE[:stages], slot, _WITH_LOADER)
                plgpu.copy_gmem_to_smem(k.at[row, keys, kv_head], shared.k.at[slot], shared.k_full.at[slot])
                if rope is not None:
                    plgpu.copy_gmem_to_smem(rope.at[row, keys], shared.rope.at[slot], shared.k_full.at[slot])

                @pl.when(j == first)
                def _():
                    pl.when(i > 0)(lambda: sync(_Q_FREE, 0, _WITH_LOADER))
                    rows = pl.ds(q_tile * TILE_Q, TILE_Q)
                    plgpu.copy_gmem_to_smem(q.at[row, rows, head], shared.q, shared.q_full)

                sync(_V_FREE[:stages], slot, _WITH_LOADER)
                plgpu.copy_gmem_to_smem(v.at[row, keys, kv_head], shared.v.at[slot], shared.v_full.at[slot])

    return step + last - first


def _compute(call, operands, outs, shared, wg, tile, step):
    """A compute warpgroup's rows of a tile; returns the number of blocks used so far."""
    _, _, _, _, q_segments, kv_segments, ranges = operands
    stages, size = call.config.stages, call.config.block_kv
    row, head, q_tile = tile
    first, whole_first, whole_last, last = call.blocks(ranges, row, q_tile)
    base = q_tile * TILE_Q + wg * ROWS
    exponent_scale = call.scale * LOG2E
    if q_segments is not None:
        mine = plgpu.load(q_segments.at[row, pl.ds(base, ROWS)], layout=PER_ROW, optimized=False)

    def slot(j):
        return lax.rem(step + j - first, stages)

    def masked(s, j):
        limit = plgpu.layout_cast(jnp.full((ROWS,), call.kv_len - 1 - j * size, jnp.int32), PER_ROW)
        if call.causal:
            limit = jnp.minimum(limit, row_numbers(ROWS) + (base + call.offset - j * size))
        s = keep_columns(s, limit, up_to=True)
        if q_segments is not None:
            keys = kv_segments.at[row, pl.ds(j * size, size)]
            theirs = plgpu.load(keys, layout=PER_COLUMN, optimized=False)
            s = jnp.where(across(mine, size) == down(theirs, ROWS), s, -jnp.inf)
        return s

    def softmax(s, peak, total, some_masked):
        """Weights 2^(c s - peak) of a block, the new maximum and sum, and the factor of what came before."""
        new_peak = jnp.maximum(peak, s.max(axis=1) * exponent_scale)
        # A row that has seen nothing keeps -inf: subtract 0 there, so that no NaN arises.
        below = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if some_masked else new_peak
        weights = jnp.exp2(s * exponent_scale - across(below, size))
        factor = jnp.exp2(peak - below)
        return weights.astype(jnp.bfloat16), new_peak, total * factor + weights.sum(axis=1), factor

    def start_scores(acc, j):
        rows = shared.q.at[pl.ds(wg * ROWS, ROWS)]
        if shared.rope is None:
            plgpu.wgmma(acc, rows, shared.k.at[slot(j)].transpose((1, 0)))
        else:
            plgpu.wgmma(acc, rows.at[:, pl.ds(0, call.d_k)], shared.k.at[slot(j)].transpose((1, 0)))
            rope = rows.at[:, pl.ds(call.d_k, call.d_qk - call.d_k)]
            plgpu.wgmma(acc, rope, shared.rope.at[slot(j)].transpose((1, 0)))

    def release_keys(j):
        arrive(_K_FREE[:stages], slot(j), _WITH_LOADER)
        pl.when(j == last - 1)(lambda: arrive(_Q_FREE, 0, _WITH_LOADER))

    def release_values(j):
        arrive(_V_FREE[:stages], slot(j), _WITH_LOADER)

    scores = plgpu.ACC((ROWS, size), jnp.float32)

    def accumulate(out):
        def first_scores(acc):
            plgpu.barrier_wait(shared.q_full)
            plgpu.barrier_wait(shared.k_full.at[slot(first)])
            sync(_TURN, wg, _ALL)
            start_scores(acc, first)
            arrive(_TURN, 1 - wg, _ALL)
            return plgpu.wgmma_accumulator_load(acc, wait_n=0)

        s = pl.run_scoped(first_scores, scores)
        release_keys(first)
        peak = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
        *carry, _ = softmax(masked(s, first), peak, total, True)

        def body(j, carry, some_masked):
            weights, peak, total = carry

            def products(acc):
                plgpu.barrier_wait(shared.v_full.at[slot(j - 1)])
                plgpu.barrier_wait(shared.k_full.at[slot(j)])
                sync(_TURN, wg, _ALL)
                if call.config.scores_first:
                    start_scores(acc, j)
                plgpu.wgmma(out, weights, shared.v.at[slot(j - 1)])
                if not call.config.scores_first:
                    start_scores(acc, j)
                arrive(_TURN, 1 - wg, _ALL)
                if not call.config.scores_first:
                    plgpu.wgmma_wait(1 if shared.rope is None else 2)
                    release_values(j - 1)
                return plgpu.wgmma_accumulator_load(acc, wait_n=0)

            s = pl.run_scoped(products, scores)
            if call.config.scores_first:
                release_values(j - 1)
            release_keys(j)
            weights, peak, total, factor = softmax(masked(s, j) if some_masked else s, peak, total, some_masked)
            out[...] = plgpu.wgmma_accumulator_load(out, wait_n=None) * across(factor, call.d_v)
            return weights, peak, total

        start = first + 1
        for end, some_masked in ((whole_first, True), (whole_last, False), (last, True)):
            if end is not whole_first or ranges is not None:  # Without segments all of the first are visible.
                end = lax.clamp(start, jnp.int32(end), last)
                carry = lax.fori_loop(start, end, functools.partial(body, some_masked=some_masked), tuple(carry))
                start = end
        weights, peak, total = carry
        plgpu.barrier_wait(shared.v_full.at[slot(last - 1)])
        sync(_TURN, wg, _ALL)
        plgpu.wgmma(out, weights, shared.v.at[slot(last - 1)])
        arrive(_TURN, 1 - wg, _ALL)
        result = plgpu.wgmma_accumulator_load(out, wait_n=0)
        release_values(last - 1)
        return result, peak, total

    _store(call, outs, shared, wg, row, head, base, *pl.run_scoped(accumulate, plgpu.ACC((ROWS, call.d_v))))
    return step + last - first


def _store(call, outs, shared, wg, row, head, base, result, peak, total):
    """Writes a warpgroup's output, 64 columns at a time, and log-sum-exp."""
    out, lse = outs
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    result *= across(jnp.where(seen, 1 / safe, 0.0), call.d_v)
    rows = pl.ds(base, ROWS)
    for start in range(0, call.d_v, 64):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.out[wg] = result[:, start : start + 64].astype(jnp.bfloat16)
        if start == 0:
            shared.lse[wg] = jnp.where(seen, (peak + jnp.log2(safe)) / LOG2E, -jnp.inf)
        plgpu.commit_smem()
        columns = pl.ds(start, 64)
        plgpu.copy_smem_to_gmem(shared.out.at[wg], out.at[row, rows, head, columns], commit_group=False)
        if start == 0:
            plgpu.copy_smem_to_gmem(shared.lse.at[wg], lse.at[row, head, rows], commit_group=False)
        plgpu.commit_smem_to_gmem_group()

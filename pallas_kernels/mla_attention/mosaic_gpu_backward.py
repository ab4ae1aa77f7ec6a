"""dK and dV for Hopper in Pallas Mosaic GPU, and on request the scores' gradient that dQ is made of.

With P = exp(scale S - lse) recomputed, dP = dO V^T and dS = P (dP - delta), delta the row sums of dO O
(FlashAttention-2, Dao 2023, algorithm 2):

- here, 128 keys stay and blocks of 64 queries pass. Everything is transposed, so that P^T and dS^T are
  left operands in registers: `dV += P^T dO`, `dK += dS^T Q`. dS^T can be written out;
- in `mosaic_gpu_queries`, queries stay and blocks of 64 keys pass: `dQ += dS K`, with dS read back, or
  recomputed where it would take too much memory.

All accumulate in registers in a fixed order, so results repeat bit for bit. dS is rounded to bf16, and so
is P; while dP is computed, P waits in float16, for want of registers.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import mosaic_gpu_common as common
from pallas_kernels.mla_attention.mosaic_gpu_call import BLOCK, UNIT
from pallas_kernels.mla_attention.mosaic_gpu_common import ROWS, TILE, WARPGROUPS, arrive, down, sync, tiled

STAGES = 3  # blocks in shared memory
FIRST_FREE, SECOND_FREE = range(4, 4 + STAGES), range(8, 8 + STAGES)  # hardware barriers
_NEVER = 1 << 30


class Operands(typing.NamedTuple):
    """What the backward kernels read.

    Attributes:
      q, k, v, k_rope, d_out: bf16 `[batch, length, heads, width]`, lengths padded to a multiple of 8; k_rope,
        `[batch, kv_len, d_rope]`, may be None.
      shift: float32 `[batch, heads, rows of whole tiles]`, (-lse - log(UNIT)) / scale; -inf where a query
        sees nothing.
      delta: float32, likewise: minus the row sums of d_out * out; 0 in the padding.
      q_segments, kv_segments: int32, padded to whole tiles, or None.
      ranges: int32 `[batch, tiles, 4]`, the blocks that each tile visits, or None without segments.
    """

    q: typing.Any
    k: typing.Any
    v: typing.Any
    k_rope: typing.Any
    d_out: typing.Any
    shift: typing.Any
    delta: typing.Any
    q_segments: typing.Any
    kv_segments: typing.Any
    ranges: typing.Any


class _Shared(typing.NamedTuple):
    """Shared memory of a program, and the barriers that its loads complete."""

    k: typing.Any
    k_rope: typing.Any
    v: typing.Any
    q: typing.Any
    d_out: typing.Any
    shift: typing.Any
    delta: typing.Any
    scores: typing.Any
    kv_full: typing.Any
    q_full: typing.Any
    d_out_full: typing.Any


def keys_values(operands: Operands, *, call, heads: tuple[int, int], with_scores: bool):
    """dK and dV of some key heads.

    Args:
      operands: what is read; `ranges` is by key tile, in tiles of 128 queries.
      call: what is static.
      heads: the first key head, and how many.
      with_scores: whether to write dS^T.

    Returns:
      In bf16: dk `[batch, kv_len, key heads, d_k]`, dv, each head's share of d k_rope or None, and dS^T
      `[batch * heads, keys of whole tiles, queries of whole tiles]` or None. dS^T is written only in the
      tiles visited, those in `ranges`.
    """
    first_head, count = heads

    def kernel(*refs):
        gmem, outs, shared = Operands(*refs[:10]), refs[10:14], _Shared(*refs[14:])
        row, local, tile = call.locate(lax.axis_index("program"), count, call.kv_tiles, call.q_len, True)
        blocks = call.query_blocks(gmem.ranges, row, tile)
        work = _Work(call, gmem, shared, row, first_head + local, tile, blocks)
        pair = (row * count + local) * call.group
        common.roles(
            lambda wg: _compute(work, wg, outs, local, pair),
            lambda: common.load_with(call.loaders, lambda: _load(work)),
        )

    def result(width):
        shape = call.batch, operands.k.shape[1], count, width
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    scores = call.batch * count * call.group, call.kv_tiles * TILE, call.q_tiles * TILE
    out_type = [
        result(call.d_k),
        result(call.d_v),
        result(call.d_rope) if call.d_rope else None,
        jax.ShapeDtypeStruct(scores, jnp.bfloat16) if with_scores else None,
    ]
    scratch = _Shared(
        k=tiled(TILE, call.d_k),
        k_rope=tiled(TILE, call.d_rope) if call.d_rope else None,
        v=tiled(TILE, call.d_v),
        q=tiled(STAGES, BLOCK, call.d_qk),
        d_out=tiled(STAGES, BLOCK, call.d_v),
        shift=plgpu.SMEM((STAGES, BLOCK), jnp.float32),
        delta=plgpu.SMEM((STAGES, BLOCK), jnp.float32),
        scores=tiled(WARPGROUPS, ROWS, BLOCK) if with_scores else None,
        kv_full=plgpu.Barrier(num_arrivals=3 if call.d_rope else 2),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        d_out_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )
    programs = call.batch * count * call.kv_tiles
    run = common.launch(kernel, "mla_attention_keys_values", programs, out_type, list(scratch))
    return run(*operands)


class _Work(typing.NamedTuple):
    """A program's work: a tile of keys of one head."""

    call: typing.Any
    gmem: Operands
    shared: _Shared
    row: typing.Any  # of the batch
    kv_head: typing.Any
    tile: typing.Any
    blocks: tuple  # `Call.query_blocks`


def _load(work):
    call, gmem, shared, row, kv_head, tile, (first, _, _, last) = work
    keys = pl.ds(tile * TILE, TILE)
    plgpu.copy_gmem_to_smem(gmem.k.at[row, keys, kv_head], shared.k, shared.kv_full)
    if call.d_rope:
        plgpu.copy_gmem_to_smem(gmem.k_rope.at[row, keys], shared.k_rope, shared.kv_full)
    plgpu.copy_gmem_to_smem(gmem.v.at[row, keys, kv_head], shared.v, shared.kv_full)

    @pl.loop(0, call.group * (last - first))
    def _(use):
        head = kv_head * call.group + lax.div(use, last - first)
        rows = pl.ds((first + lax.rem(use, last - first)) * BLOCK, BLOCK)
        slot = lax.rem(use, STAGES)
        full = shared.q_full.at[slot]
        sync(FIRST_FREE, slot, call.with_loader)
        plgpu.copy_gmem_to_smem(gmem.q.at[row, rows, head], shared.q.at[slot], full)
        plgpu.copy_gmem_to_smem(gmem.shift.at[row, head, rows], shared.shift.at[slot], full)
        full = shared.d_out_full.at[slot]
        sync(SECOND_FREE, slot, call.with_loader)
        plgpu.copy_gmem_to_smem(gmem.d_out.at[row, rows, head], shared.d_out.at[slot], full)
        plgpu.copy_gmem_to_smem(gmem.delta.at[row, head, rows], shared.delta.at[slot], full)


def _compute(work, wg, outs, local, pair):
    """A compute warpgroup's 64 keys. `pair` is where dS^T of the first query head goes."""
    call, gmem, shared, row, _, tile, (first, whole_first, whole_last, last) = work
    dk_gmem, dv_gmem, d_rope_gmem, scores_gmem = outs
    for slot in range(STAGES):
        arrive(FIRST_FREE, slot, call.with_loader)
        arrive(SECOND_FREE, slot, call.with_loader)
    mine, rows = pl.ds(wg * ROWS, ROWS), pl.ds(tile * TILE + wg * ROWS, ROWS)
    segments = None if gmem.kv_segments is None else common.per_row(gmem.kv_segments.at[row, rows])
    plgpu.barrier_wait(shared.kv_full)

    def write_scores(d_scores, i, member):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        shared.scores[wg] = d_scores
        plgpu.commit_smem()
        columns = scores_gmem.at[pair + member, rows, pl.ds(i * BLOCK, BLOCK)]
        plgpu.copy_smem_to_gmem(shared.scores.at[wg], columns)

    def accumulate(dk, dv):
        zero = common.runtime_zero()

        def step(i, me, member, some_masked):
            slot = lax.rem(member * (last - first) + i - first, STAGES)
            d_scores = _step(work, pl.ds(me * ROWS, ROWS), slot, i, segments, rows, some_masked, dk, dv)
            if scores_gmem is not None:
                write_scores(d_scores, i, member)
            plgpu.wgmma_wait(1)
            arrive(SECOND_FREE, slot, call.with_loader)
            plgpu.wgmma_wait(0)
            arrive(FIRST_FREE, slot, call.with_loader)
            return me + zero

        def one_head(member, me):
            begin = first
            for end, some_masked in ((whole_first, True), (whole_last, False), (last, True)):
                end = lax.clamp(begin, jnp.int32(end), last)
                body = functools.partial(step, member=member, some_masked=some_masked)
                me = lax.fori_loop(begin, end, body, me)
                begin = end
            return me

        lax.fori_loop(0, call.group, one_head, wg)
        return dk[...], dv[...]

    dk, dv = pl.run_scoped(accumulate, plgpu.ACC((ROWS, call.d_qk)), plgpu.ACC((ROWS, call.d_v)))
    dk *= call.scale * UNIT
    dv *= UNIT
    shared.k[mine] = dk[:, : call.d_k].astype(jnp.bfloat16)
    shared.v[mine] = dv.astype(jnp.bfloat16)
    if call.d_rope:
        shared.k_rope[mine] = dk[:, call.d_k :].astype(jnp.bfloat16)
    plgpu.commit_smem()
    for tile_smem, out in ((shared.k, dk_gmem), (shared.v, dv_gmem), (shared.k_rope, d_rope_gmem)):
        if out is not None:
            plgpu.copy_smem_to_gmem(tile_smem.at[mine], out.at[row, rows, local])
    plgpu.wait_smem_to_gmem(0)


def _step(work, mine, slot, i, segments, rows, some_masked, dk, dv):
    """Adds query block i to the accumulators dk and dv, without waiting for them; returns dS^T in bf16."""
    call, _, shared, *_ = work
    square = plgpu.ACC((ROWS, BLOCK), jnp.float32)

    @functools.partial(pl.run_scoped, s=square)
    def weights(s):
        plgpu.barrier_wait(shared.q_full.at[slot])
        # Where the sum starts, instead of a subtraction after it: no registers held meanwhile.
        s[...] = down(plgpu.load(shared.shift.at[slot], layout=common.PER_COLUMN), ROWS)
        if call.d_rope:
            columns = pl.ds(0, call.d_k), pl.ds(call.d_k, call.d_rope)
            plgpu.wgmma(s, shared.k.at[mine], shared.q.at[slot, :, columns[0]].transpose((1, 0)))
            plgpu.wgmma(s, shared.k_rope.at[mine], shared.q.at[slot, :, columns[1]].transpose((1, 0)))
        else:
            plgpu.wgmma(s, shared.k.at[mine], shared.q.at[slot].transpose((1, 0)))
        s = plgpu.wgmma_accumulator_load(s, wait_n=0)
        s = _masked(work, s, i, segments, rows) if some_masked else s
        # The barrier keeps the rounding packed, two numbers an instruction.
        return lax.optimization_barrier(jnp.exp2(s * (call.scale * common.LOG2E)).astype(jnp.float16))

    @functools.partial(pl.run_scoped, dp=square)
    def d_scores(dp):
        plgpu.barrier_wait(shared.d_out_full.at[slot])
        dp[...] = down(plgpu.load(shared.delta.at[slot], layout=common.PER_COLUMN), ROWS)
        plgpu.wgmma(dp, shared.v.at[mine], shared.d_out.at[slot].transpose((1, 0)))
        dp = plgpu.wgmma_accumulator_load(dp, wait_n=0)
        return (weights.astype(jnp.float32) * dp).astype(jnp.bfloat16)

    plgpu.wgmma(dv, weights.astype(jnp.bfloat16), shared.d_out.at[slot])
    plgpu.wgmma(dk, d_scores, shared.q.at[slot])
    return d_scores


def _masked(work, s, i, segments, rows):
    """-inf where a query (column) does not see a key (row)."""
    call, gmem, _, row, *_ = work
    key = common.row_numbers() + rows.start
    limit = key - (call.offset + i * BLOCK) if call.causal else jnp.zeros_like(key)
    s = common.keep_columns(s, jnp.where(key < call.kv_len, limit, _NEVER), up_to=False)
    if segments is not None:
        ids = common.per_column(gmem.q_segments.at[row, pl.ds(i * BLOCK, BLOCK)])
        s = jnp.where(common.across(segments, BLOCK) == down(ids, ROWS), s, -jnp.inf)
    return s

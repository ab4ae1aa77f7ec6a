"""dQ for Hopper in Pallas Mosaic GPU: from dS as `keys_values` wrote it, or with dS recomputed."""

import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import mosaic_gpu_common as common
from pallas_kernels.mla_attention.mosaic_gpu_backward import FIRST_FREE, SECOND_FREE, STAGES, Operands
from pallas_kernels.mla_attention.mosaic_gpu_call import BLOCK, UNIT
from pallas_kernels.mla_attention.mosaic_gpu_common import ROWS, TILE, WARPGROUPS, across, arrive, sync, tiled


def from_scores(scores, k, k_rope, ranges, *, call, heads: tuple[int, int]):
    """dQ `[batch, q_len, heads, d_qk]` in bf16 of the query heads of some key heads, from dS^T.

    A program has 256 queries, 128 a warpgroup, so that a block of keys serves twice as many as elsewhere.

    Args:
      scores: dS^T, as `keys_values` writes it.
      k, k_rope: as `keys_values` reads them.
      ranges: int32 `[batch, q tiles, 4]`, in blocks of 64 keys, or None without segments.
      call: what is static.
      heads: the first key head, and how many.
    """
    first_head, count = heads[0], heads[1] * call.group
    tiles = -(-call.q_tiles // WARPGROUPS)

    def kernel(*refs):
        scores_g, k_g, rope_g, ranges_g, dq_g, scores_s, k_s, rope_s, out_s, full = refs
        row, head, tile = call.locate(lax.axis_index("program"), count, tiles, call.kv_len, not call.causal)
        # A tile's second half may not exist: it repeats the first's work, and its rows are not written.
        existing = [lax.min(WARPGROUPS * tile + wg, call.q_tiles - 1) for wg in range(WARPGROUPS)]
        bounds = [call.key_blocks(ranges_g, row, q_tile, BLOCK) for q_tile in existing]
        first, last = lax.min(bounds[0][0], bounds[1][0]), lax.max(bounds[0][3], bounds[1][3])

        def load():
            kv_head = first_head + lax.div(head, call.group)
            columns = pl.ds(tile * WARPGROUPS * TILE, WARPGROUPS * TILE)

            @pl.loop(first, last)
            def _(j):
                slot, keys = lax.rem(j - first, STAGES), pl.ds(j * BLOCK, BLOCK)
                sync(FIRST_FREE, slot, call.with_loader)
                pair = scores_g.at[row * count + head, keys, columns]
                plgpu.copy_gmem_to_smem(pair, scores_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(k_g.at[row, keys, kv_head], k_s.at[slot], full.at[slot])
                if call.d_rope:
                    plgpu.copy_gmem_to_smem(rope_g.at[row, keys], rope_s.at[slot], full.at[slot])

        def compute(wg):
            mine = [lax.select(wg == 0, bounds[0][i], bounds[1][i]) for i in (0, 3)]
            smem = scores_s, (k_s, rope_s), full
            accumulate = functools.partial(_accumulate, call, wg, (first, last), mine, *smem)
            parts = pl.run_scoped(accumulate, *(plgpu.ACC((TILE, d)) for d in (call.d_k, call.d_rope) if d))
            start = (WARPGROUPS * tile + wg) * TILE
            halves = [dq_g.at[row, pl.ds(start + i * ROWS, ROWS), head] for i in range(TILE // ROWS)]
            _store(call, parts, out_s.at[wg], halves)

        common.roles(compute, lambda: common.load_with(call.loaders, load))

    scratch = [
        tiled(STAGES, BLOCK, WARPGROUPS * TILE),
        tiled(STAGES, BLOCK, call.d_k),
        tiled(STAGES, BLOCK, call.d_rope) if call.d_rope else None,
        tiled(WARPGROUPS, ROWS, 64),
        plgpu.Barrier(num_arrivals=3 if call.d_rope else 2, num_barriers=STAGES),
    ]
    shape = call.batch, -(-call.q_len // 8) * 8, count, call.d_qk
    out_type = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    run = common.launch(kernel, "mla_attention_queries", call.batch * count * tiles, out_type, scratch)
    return run(scores, k, k_rope, ranges)


def _accumulate(call, wg, tile_blocks, my_blocks, scores, keys, full, dq, dq_rope=None):
    """dS K of a warpgroup's 128 queries. Blocks of the tile that only the other half sees are passed over."""
    (first, last), (my_first, my_last) = tile_blocks, my_blocks
    for slot in range(STAGES):
        arrive(FIRST_FREE, slot, call.with_loader)

    def slot_of(j):
        return lax.rem(j - first, STAGES)

    def skip(j, _):
        plgpu.barrier_wait(full.at[slot_of(j)])
        arrive(FIRST_FREE, slot_of(j), call.with_loader)
        return ()

    def step(j, _):
        slot = slot_of(j)
        plgpu.barrier_wait(full.at[slot])
        mine = scores.at[slot, :, pl.ds(wg * TILE, TILE)].transpose((1, 0))
        plgpu.wgmma(dq, mine, keys[0].at[slot])
        if dq_rope is not None:
            plgpu.wgmma(dq_rope, mine, keys[1].at[slot])

        @pl.when(j > my_first)
        def _():
            plgpu.wgmma_wait(1 if dq_rope is None else 2)
            arrive(FIRST_FREE, slot_of(j - 1), call.with_loader)

        return ()

    lax.fori_loop(first, my_first, skip, ())
    lax.fori_loop(my_first, my_last, step, ())
    plgpu.wgmma_wait(0)
    arrive(FIRST_FREE, slot_of(my_last - 1), call.with_loader)
    lax.fori_loop(my_last, last, skip, ())
    return [dq[...]] if dq_rope is None else [dq[...], dq_rope[...]]


def _store(call, parts, staging, halves):
    """Writes a warpgroup's 128 rows of dQ, 64 x 64 at a time."""
    column = 0
    for part in parts:
        for start in range(0, part.shape[1], 64):
            for i, half in enumerate(halves):
                piece = part[i * ROWS : (i + 1) * ROWS, start : start + 64] * (call.scale * UNIT)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staging[...] = piece.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging, half.at[:, pl.ds(column, 64)])
            column += 64
    plgpu.wait_smem_to_gmem(0)


class _Shared(typing.NamedTuple):
    """Shared memory of a program, and the barriers that its loads complete."""

    q: typing.Any
    d_out: typing.Any
    k: typing.Any
    k_rope: typing.Any
    v: typing.Any
    q_full: typing.Any
    k_full: typing.Any
    v_full: typing.Any


def recomputed(operands: Operands, *, call):
    """dQ `[batch, q_len, heads, d_qk]` in bf16, with dS recomputed; `ranges` is in blocks of 64 keys."""

    def kernel(*refs):
        gmem, dq, shared = Operands(*refs[:10]), refs[10], _Shared(*refs[11:])
        index = lax.axis_index("program")
        row, head, tile = call.locate(index, call.heads, call.q_tiles, call.kv_len, not call.causal)
        work = row, head, tile, call.key_blocks(gmem.ranges, row, tile, BLOCK)
        common.roles(
            lambda wg: _compute(call, gmem, dq, shared, wg, work),
            lambda: common.load_with(call.loaders, lambda: _load(call, gmem, shared, work)),
        )

    scratch = _Shared(
        q=tiled(TILE, call.d_qk),
        d_out=tiled(TILE, call.d_v),
        k=tiled(STAGES, BLOCK, call.d_k),
        k_rope=tiled(STAGES, BLOCK, call.d_rope) if call.d_rope else None,
        v=tiled(STAGES, BLOCK, call.d_v),
        q_full=plgpu.Barrier(num_arrivals=2),
        k_full=plgpu.Barrier(num_arrivals=2 if call.d_rope else 1, num_barriers=STAGES),
        v_full=plgpu.Barrier(num_barriers=STAGES),
    )
    out_type = jax.ShapeDtypeStruct(operands.q.shape, jnp.bfloat16)
    programs = call.batch * call.heads * call.q_tiles
    run = common.launch(kernel, "mla_attention_queries_recomputed", programs, out_type, list(scratch))
    return run(*operands)


def _load(call, gmem, shared, work):
    row, head, tile, (first, _, _, last) = work
    kv_head, rows = lax.div(head, call.group), pl.ds(tile * TILE, TILE)
    plgpu.copy_gmem_to_smem(gmem.q.at[row, rows, head], shared.q, shared.q_full)
    plgpu.copy_gmem_to_smem(gmem.d_out.at[row, rows, head], shared.d_out, shared.q_full)

    @pl.loop(first, last)
    def _(j):
        slot, keys = lax.rem(j - first, STAGES), pl.ds(j * BLOCK, BLOCK)
        sync(FIRST_FREE, slot, call.with_loader)
        plgpu.copy_gmem_to_smem(gmem.k.at[row, keys, kv_head], shared.k.at[slot], shared.k_full.at[slot])
        if call.d_rope:
            plgpu.copy_gmem_to_smem(gmem.k_rope.at[row, keys], shared.k_rope.at[slot], shared.k_full.at[slot])
        sync(SECOND_FREE, slot, call.with_loader)
        plgpu.copy_gmem_to_smem(gmem.v.at[row, keys, kv_head], shared.v.at[slot], shared.v_full.at[slot])


def _compute(call, gmem, dq_gmem, shared, wg, work):
    """A compute warpgroup's 64 queries."""
    row, head, tile, (first, whole_first, whole_last, last) = work
    for slot in range(STAGES):
        arrive(FIRST_FREE, slot, call.with_loader)
        arrive(SECOND_FREE, slot, call.with_loader)
    mine, base = pl.ds(wg * ROWS, ROWS), tile * TILE + wg * ROWS
    rows = pl.ds(base, ROWS)
    exponent_scale = call.scale * common.LOG2E
    shift = common.per_row(gmem.shift.at[row, head, rows]) * exponent_scale
    delta = common.per_row(gmem.delta.at[row, head, rows])
    segments = None if gmem.q_segments is None else common.per_row(gmem.q_segments.at[row, rows])
    plgpu.barrier_wait(shared.q_full)

    def key_segments(j):
        return common.per_column(gmem.kv_segments.at[row, pl.ds(j * BLOCK, BLOCK)])

    def step(j, some_masked, *dq):
        slot = lax.rem(j - first, STAGES)
        square = plgpu.ACC((ROWS, BLOCK), jnp.float32)
        s, dp = pl.run_scoped(functools.partial(_products, call, shared, mine, slot), square, square)
        arrive(SECOND_FREE, slot, call.with_loader)
        if some_masked:
            s = common.hide_keys(s, call, base, j * BLOCK, segments, lambda: key_segments(j))
        p = jnp.exp2(s * exponent_scale + across(shift, BLOCK))
        d_scores = (p * (dp + across(delta, BLOCK))).astype(jnp.bfloat16)
        for accumulator, keys in zip(dq, (shared.k, shared.k_rope), strict=False):
            plgpu.wgmma(accumulator, d_scores, keys.at[slot])
        plgpu.wgmma_wait(0)
        arrive(FIRST_FREE, slot, call.with_loader)

    def accumulate(*dq):
        start = first
        for end, some_masked in ((whole_first, True), (whole_last, False), (last, True)):
            end = lax.clamp(start, jnp.int32(end), last)
            pl.loop(start, end)(lambda j, some_masked=some_masked: step(j, some_masked, *dq))
            start = end
        return [part[...] for part in dq]

    parts = pl.run_scoped(accumulate, *(plgpu.ACC((ROWS, d)) for d in (call.d_k, call.d_rope) if d))
    start = 0
    for part in parts:
        shared.q[mine, pl.ds(start, part.shape[1])] = (part * (call.scale * UNIT)).astype(jnp.bfloat16)
        start += part.shape[1]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.q.at[mine], dq_gmem.at[row, rows, head])
    plgpu.wait_smem_to_gmem(0)


def _products(call, shared, mine, slot, s, dp):
    """S = Q K^T and dP = dO V^T of a block."""
    plgpu.barrier_wait(shared.k_full.at[slot])
    keys = shared.k.at[slot].transpose((1, 0))
    if call.d_rope:
        plgpu.wgmma(s, shared.q.at[mine, pl.ds(0, call.d_k)], keys)
        rope = shared.q.at[mine, pl.ds(call.d_k, call.d_rope)]
        plgpu.wgmma(s, rope, shared.k_rope.at[slot].transpose((1, 0)))
    else:
        plgpu.wgmma(s, shared.q.at[mine], keys)
    plgpu.barrier_wait(shared.v_full.at[slot])
    plgpu.wgmma(dp, shared.d_out.at[mine], shared.v.at[slot].transpose((1, 0)))
    return plgpu.wgmma_accumulator_load(s, wait_n=1), plgpu.wgmma_accumulator_load(dp, wait_n=0)

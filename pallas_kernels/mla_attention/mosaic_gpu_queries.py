"""dQ for Hopper in Pallas Mosaic GPU: from dS as `keys_values` wrote it, or with dS recomputed."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention.mosaic_gpu_backward import (
    BLOCK,
    FIRST_FREE,
    ROWS,
    SECOND_FREE,
    TILE,
    WARPGROUPS,
    WITH_LOADER,
    launch,
    roles,
)
from pallas_kernels.mla_attention.mosaic_gpu_common import (
    LOG2E,
    PER_COLUMN,
    PER_ROW,
    across,
    arrive,
    down,
    keep_columns,
    row_numbers,
    sync,
    tiled,
)


def from_scores(scores, k, k_rope, ranges, *, call):
    """dQ `[batch, q_len, heads, d_qk]` in bf16 of a range of heads, from dS^T.

    Args:
      scores: dS^T, as `keys_values` writes it.
      k, k_rope: as `keys_values` takes them.
      ranges: int32 `[batch, q tiles, 4]`, in blocks of 64 keys, or None without segments.
      call: what is static.
    """
    q_tiles = -(-call.q_len // TILE)
    tiles = -(-q_tiles // WARPGROUPS)
    kv_heads, group = call.kv_head_range[1], call.group
    d_rope = call.d_qk - call.d_k

    def kernel(*refs):
        ds_g, k_g, rope_g, ranges_g, dq_g, ds_s, k_s, rope_s, out_s, full = refs
        heads = kv_heads * group
        row, head, tile = call.tile(lax.axis_index("program"), heads, tiles, call.kv_len, not call.causal)
        pair = row * heads + head
        existing = [lax.min(WARPGROUPS * tile + wg, q_tiles - 1) for wg in range(WARPGROUPS)]
        bounds = [call.key_blocks(ranges_g, row, q_tile) for q_tile in existing]
        first = lax.min(bounds[0][0], bounds[1][0])
        last = lax.max(bounds[0][3], bounds[1][3])

        def load():
            kv_head = call.kv_head_range[0] + lax.div(head, group)

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    columns = pl.ds(tile * WARPGROUPS * TILE, WARPGROUPS * TILE)

                    @pl.loop(first, last)
                    def _(j):
                        slot, keys = lax.rem(j - first, call.stages), pl.ds(j * BLOCK, BLOCK)
                        sync(FIRST_FREE[: call.stages], slot, WITH_LOADER)
                        plgpu.copy_gmem_to_smem(ds_g.at[pair, keys, columns], ds_s.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(k_g.at[row, keys, kv_head], k_s.at[slot], full.at[slot])
                        if d_rope:
                            plgpu.copy_gmem_to_smem(rope_g.at[row, keys], rope_s.at[slot], full.at[slot])

        def compute(wg):
            for slot in range(call.stages):
                arrive(FIRST_FREE, slot, WITH_LOADER)
            my_first = lax.select(wg == 0, bounds[0][0], bounds[1][0])
            my_last = lax.select(wg == 0, bounds[0][3], bounds[1][3])

            def skip(j, _):
                slot = lax.rem(j - first, call.stages)
                plgpu.barrier_wait(full.at[slot])
                arrive(FIRST_FREE[: call.stages], slot, WITH_LOADER)
                return ()

            def accumulate(dq, dq_rope=None):
                def step(j, _):
                    slot = lax.rem(j - first, call.stages)
                    plgpu.barrier_wait(full.at[slot])
                    scores = ds_s.at[slot, :, pl.ds(wg * TILE, TILE)].transpose((1, 0))
                    plgpu.wgmma(dq, scores, k_s.at[slot])
                    if d_rope:
                        plgpu.wgmma(dq_rope, scores, rope_s.at[slot])

                    @pl.when(j > my_first)
                    def _():
                        plgpu.wgmma_wait(2 if d_rope else 1)
                        before = lax.rem(j - first - 1, call.stages)
                        arrive(FIRST_FREE[: call.stages], before, WITH_LOADER)

                    return ()

                lax.fori_loop(first, my_first, skip, ())
                lax.fori_loop(my_first, my_last, step, ())
                plgpu.wgmma_wait(0)
                arrive(FIRST_FREE[: call.stages], lax.rem(my_last - 1 - first, call.stages), WITH_LOADER)
                lax.fori_loop(my_last, last, skip, ())
                return dq[...] if dq_rope is None else (dq[...], dq_rope[...])

            parts = pl.run_scoped(accumulate, *(plgpu.ACC((TILE, d)) for d in (call.d_k, d_rope) if d))
            column = 0
            for part in parts if d_rope else (parts,):
                for start in range(0, part.shape[1], 64):
                    for half in range(TILE // ROWS):
                        piece = part[half * ROWS : (half + 1) * ROWS, start : start + 64] * call.scale
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_s[wg] = piece.astype(jnp.bfloat16)
                        plgpu.commit_smem()
                        rows = pl.ds((WARPGROUPS * tile + wg) * TILE + half * ROWS, ROWS)
                        plgpu.copy_smem_to_gmem(out_s.at[wg], dq_g.at[row, rows, head, pl.ds(column, 64)])
                    column += 64
            plgpu.wait_smem_to_gmem(0)

        roles(compute, load)

    scratch = [
        tiled(call.stages, BLOCK, WARPGROUPS * TILE),
        tiled(call.stages, BLOCK, call.d_k),
        tiled(call.stages, BLOCK, d_rope) if d_rope else None,
        tiled(WARPGROUPS, ROWS, 64),
        plgpu.Barrier(num_arrivals=3 if d_rope else 2, num_barriers=call.stages),
    ]
    rows = -(-call.q_len // 8) * 8
    out_type = jax.ShapeDtypeStruct((call.batch, rows, kv_heads * group, call.d_qk), jnp.bfloat16)
    programs = call.batch * kv_heads * group * tiles
    return launch(kernel, "mla_attention_queries", programs, out_type, scratch)(scores, k, k_rope, ranges)


def recomputed(q, k, v, k_rope, d_out, shift, delta, q_segments, kv_segments, ranges, *, call):
    """dQ `[batch, q_len, heads, d_qk]` in bf16, with dS recomputed.

    The arguments are those of `keys_values`, but `ranges` is `[batch, q tiles, 4]` in blocks of 64 keys.
    """
    tiles = -(-call.q_len // TILE)
    d_rope = call.d_qk - call.d_k

    def kernel(*refs):
        q_g, k_g, v_g, rope_g, do_g, shift_g, delta_g, q_seg_g, kv_seg_g, ranges_g, dq_g = refs[:11]
        q_s, do_s, k_s, rope_s, v_s, q_full, k_full, v_full = refs[11:]
        row, head, tile = call.tile(lax.axis_index("program"), call.heads, tiles, call.kv_len, not call.causal)
        first, whole_first, whole_last, last = call.key_blocks(ranges_g, row, tile)

        def load():
            kv_head = lax.div(head, call.heads // call.kv_heads)

            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    rows = pl.ds(tile * TILE, TILE)
                    plgpu.copy_gmem_to_smem(q_g.at[row, rows, head], q_s, q_full)
                    plgpu.copy_gmem_to_smem(do_g.at[row, rows, head], do_s, q_full)

                    @pl.loop(first, last)
                    def _(j):
                        slot, keys = lax.rem(j - first, call.stages), pl.ds(j * BLOCK, BLOCK)
                        sync(FIRST_FREE[: call.stages], slot, WITH_LOADER)
                        plgpu.copy_gmem_to_smem(k_g.at[row, keys, kv_head], k_s.at[slot], k_full.at[slot])
                        if d_rope:
                            plgpu.copy_gmem_to_smem(rope_g.at[row, keys], rope_s.at[slot], k_full.at[slot])
                        sync(SECOND_FREE[: call.stages], slot, WITH_LOADER)
                        plgpu.copy_gmem_to_smem(v_g.at[row, keys, kv_head], v_s.at[slot], v_full.at[slot])

        def compute(wg):
            for slot in range(call.stages):
                arrive(FIRST_FREE, slot, WITH_LOADER)
                arrive(SECOND_FREE, slot, WITH_LOADER)
            mine = pl.ds(wg * ROWS, ROWS)
            base = tile * TILE + wg * ROWS
            rows = pl.ds(base, ROWS)
            exponent_scale = call.scale * LOG2E
            shift = plgpu.load(shift_g.at[row, head, rows], layout=PER_ROW, optimized=False) * exponent_scale
            delta = plgpu.load(delta_g.at[row, head, rows], layout=PER_ROW, optimized=False)
            if q_seg_g is not None:
                theirs = plgpu.load(q_seg_g.at[row, rows], layout=PER_ROW, optimized=False)
            plgpu.barrier_wait(q_full)

            def masked(s, j):
                limit = plgpu.layout_cast(jnp.full((ROWS,), call.kv_len - 1 - j * BLOCK, jnp.int32), PER_ROW)
                if call.causal:
                    limit = jnp.minimum(limit, row_numbers(ROWS) + (base + call.offset - j * BLOCK))
                s = keep_columns(s, limit, up_to=True)
                if q_seg_g is not None:
                    segments = kv_seg_g.at[row, pl.ds(j * BLOCK, BLOCK)]
                    segments = plgpu.load(segments, layout=PER_COLUMN, optimized=False)
                    s = jnp.where(across(theirs, BLOCK) == down(segments, ROWS), s, -jnp.inf)
                return s

            def accumulate(dq, dq_rope=None):
                def step(j, some_masked):
                    slot = lax.rem(j - first, call.stages)

                    def scores(s, dp):
                        plgpu.barrier_wait(k_full.at[slot])
                        if d_rope:
                            plgpu.wgmma(s, q_s.at[mine, pl.ds(0, call.d_k)], k_s.at[slot].transpose((1, 0)))
                            q_rope = q_s.at[mine, pl.ds(call.d_k, d_rope)]
                            plgpu.wgmma(s, q_rope, rope_s.at[slot].transpose((1, 0)))
                        else:
                            plgpu.wgmma(s, q_s.at[mine], k_s.at[slot].transpose((1, 0)))
                        plgpu.barrier_wait(v_full.at[slot])
                        plgpu.wgmma(dp, do_s.at[mine], v_s.at[slot].transpose((1, 0)))
                        return plgpu.wgmma_accumulator_load(s, wait_n=1), plgpu.wgmma_accumulator_load(dp, wait_n=0)

                    square = plgpu.ACC((ROWS, BLOCK), jnp.float32)
                    s, dp = pl.run_scoped(scores, square, square)
                    arrive(SECOND_FREE[: call.stages], slot, WITH_LOADER)
                    s = masked(s, j) if some_masked else s
                    p = jnp.exp2(s * exponent_scale + across(shift, BLOCK))
                    ds = (p * (dp + across(delta, BLOCK))).astype(jnp.bfloat16)
                    plgpu.wgmma(dq, ds, k_s.at[slot])
                    if d_rope:
                        plgpu.wgmma(dq_rope, ds, rope_s.at[slot])
                    plgpu.wgmma_wait(0)
                    arrive(FIRST_FREE[: call.stages], slot, WITH_LOADER)

                start = first
                for end, some_masked in ((whole_first, True), (whole_last, False), (last, True)):
                    end = lax.clamp(start, jnp.int32(end), last)

                    @pl.loop(start, end)
                    def _(j, some_masked=some_masked):
                        step(j, some_masked)

                    start = end

                return dq[...] if dq_rope is None else (dq[...], dq_rope[...])

            accumulators = [plgpu.ACC((ROWS, d)) for d in (call.d_k, d_rope) if d]
            parts = pl.run_scoped(accumulate, *accumulators)
            start = 0
            for part in parts if d_rope else (parts,):
                q_s[mine, pl.ds(start, part.shape[1])] = (part * call.scale).astype(jnp.bfloat16)
                start += part.shape[1]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[mine], dq_g.at[row, rows, head])
            plgpu.wait_smem_to_gmem(0)

        roles(compute, load)

    scratch = [
        tiled(TILE, call.d_qk),
        tiled(TILE, call.d_v),
        tiled(call.stages, BLOCK, call.d_k),
        tiled(call.stages, BLOCK, d_rope) if d_rope else None,
        tiled(call.stages, BLOCK, call.d_v),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2 if d_rope else 1, num_barriers=call.stages),
        plgpu.Barrier(num_barriers=call.stages),
    ]
    out_type = jax.ShapeDtypeStruct(q.shape, jnp.bfloat16)
    run = launch(kernel, "mla_attention_queries_recomputed", call.batch * call.heads * tiles, out_type, scratch)
    return run(q, k, v, k_rope, d_out, shift, delta, q_segments, kv_segments, ranges)

"""Backward attention for Hopper in Pallas Mosaic GPU: the kernel for dK and dV, and what it shares with dQ's.

With P = exp(scale S - lse) recomputed, dP = dO V^T and dS = P (dP - delta), delta the row sums of dO O
(FlashAttention-2, Dao 2023, algorithm 2):

- `keys_values`: 128 keys stay, blocks of queries pass. Everything is transposed, so that P^T and dS^T are left
  operands in registers: `dV += P^T dO`, `dK += dS^T Q`. It can write dS^T out.
- `mosaic_gpu_queries`: 128 or 256 queries stay, blocks of keys pass: `dQ += dS K`, with dS read back, or
  recomputed where it would take too much memory.

All accumulate in registers in a fixed order, so results repeat bit for bit. dS is rounded to bf16, and so is
P; `keys_values` computes dS from the rounded P, for want of registers.
"""

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
    across,
    arrive,
    down,
    keep_columns,
    runtime_zero,
    row_numbers,
    sync,
    tiled,
)

WARPGROUPS = 2  # that compute
ROWS = 64  # of a compute warpgroup
TILE = WARPGROUPS * ROWS  # rows that stay
BLOCK = 64  # rows of a block that passes

FIRST_FREE, SECOND_FREE = range(4, 8), range(8, 12)
WITH_LOADER = WARPGROUPS * 128 + 32
_NEVER = 1 << 30


class Call(typing.NamedTuple):
    """What is static in one call."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    causal: bool
    scale: float
    d_k: int  # width of the keys that each head has to itself
    d_qk: int
    d_v: int
    kv_head_range: tuple[int, int]  # the first key head to work on, and how many
    stages: int = 3
    l2_bytes: int = 24 * 2**20

    @property
    def offset(self) -> int:
        return self.kv_len - self.q_len

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def tile(self, index, heads, tiles, length, ascending):
        """Batch row, head and tile of a program: the longest first within groups of heads that fit in L2."""
        pairs = self.batch * heads
        together = max(1, min(pairs, self.l2_bytes // (2 * length * (self.d_qk + self.d_v))))
        together = next(n for n in range(together, 0, -1) if pairs % n == 0)
        group, within = lax.div(index, together * tiles), lax.rem(index, together * tiles)
        rank, member = lax.div(within, together), lax.rem(within, together)
        pair = group * together + member
        return lax.div(pair, heads), lax.rem(pair, heads), rank if ascending else tiles - 1 - rank

    def query_blocks(self, ranges, row, kv_tile):
        """Query blocks that see keys of a tile: (first, first of those that see all, end of those, end)."""
        if ranges is not None:
            return tuple(ranges[row, kv_tile, i] * (TILE // BLOCK) for i in range(4))
        count = -(-self.q_len // TILE) * (TILE // BLOCK)
        full = lax.convert_element_type((kv_tile + 1) * TILE <= self.kv_len, jnp.int32)  # All its keys exist.
        if not self.causal:
            return jnp.int32(0), 0, full * count, jnp.int32(count)
        first_key = kv_tile * TILE - self.offset  # The first query that sees the tile's first key.
        first = lax.clamp(0, lax.div(first_key, TILE), -(-self.q_len // TILE) - 1) * (TILE // BLOCK)
        whole = lax.clamp(first, lax.div(first_key + TILE - 1 + BLOCK - 1, BLOCK), count)
        return first, whole, whole + full * (count - whole), jnp.int32(count)

    def key_blocks(self, ranges, row, q_tile):
        """Key blocks that a query tile sees: (first, first of the wholly visible, end of those, end)."""
        if ranges is not None:
            return tuple(ranges[row, q_tile, i] for i in range(4))
        count, whole = -(-self.kv_len // BLOCK), self.kv_len // BLOCK
        if not self.causal:
            return jnp.int32(0), 0, whole, jnp.int32(count)
        seen = q_tile * TILE + self.offset + 1  # Keys that the tile's first query sees.
        last = lax.clamp(1, lax.div(seen + TILE + BLOCK - 2, BLOCK), count)
        return jnp.int32(0), 0, lax.clamp(0, lax.div(seen, BLOCK), min(whole, count)), last


def launch(body, name, tiles, out_type, scratch):
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(tiles,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name=name,
    )


def roles(compute, load):
    wg = lax.axis_index("wg")

    @pl.when(wg < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        compute(wg)

    @pl.when(wg == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        load()


def keys_values(q, k, v, k_rope, d_out, shift, delta, q_segments, kv_segments, ranges, *, call, with_scores):
    """dK and dV of a range of heads.

    Args:
      q, k, v, k_rope, d_out: bf16, rows padded to a multiple of 8, as for the forward kernel.
      shift: float32 `[batch, heads, rows of whole tiles]`, -lse / scale; -inf where a query sees nothing.
      delta: float32, likewise: minus the row sums of d_out * out; 0 in the padding.
      q_segments, kv_segments: int32, padded to whole tiles, or None.
      ranges: int32 `[batch, kv tiles, 4]`, in tiles of 128 queries, or None without segments.
      call: what is static.
      with_scores: whether to write dS^T.

    Returns:
      In bf16: dk `[batch, kv_len, key heads, d_k]`, dv, each head's share of d k_rope or None, and dS^T
      `[batch * heads, keys of whole tiles, queries of whole tiles]` or None. dS^T is written only in the tiles
      visited, those in `ranges`.
    """
    tiles, q_tiles = -(-call.kv_len // TILE), -(-call.q_len // TILE)
    kv_heads, group = call.kv_head_range[1], call.group
    d_rope = call.d_qk - call.d_k

    def kernel(*refs):
        q_g, k_g, v_g, rope_g, do_g, shift_g, delta_g, q_seg_g, kv_seg_g, ranges_g = refs[:10]
        dk_g, dv_g, d_rope_g, ds_g = refs[10:14]
        k_s, rope_s, v_s, q_s, do_s, shift_s, delta_s, ds_s, kv_full, q_full, do_full = refs[14:]
        row, local, tile = call.tile(lax.axis_index("program"), kv_heads, tiles, call.q_len, True)
        kv_head = call.kv_head_range[0] + local
        first, whole_first, whole_last, last = call.query_blocks(ranges_g, row, tile)

        def load():
            @plgpu.warp_map
            def _(warp):
                @pl.when(warp == 0)
                def _():
                    keys = pl.ds(tile * TILE, TILE)
                    plgpu.copy_gmem_to_smem(k_g.at[row, keys, kv_head], k_s, kv_full)
                    if d_rope:
                        plgpu.copy_gmem_to_smem(rope_g.at[row, keys], rope_s, kv_full)
                    plgpu.copy_gmem_to_smem(v_g.at[row, keys, kv_head], v_s, kv_full)

                    @pl.loop(0, group * (last - first))
                    def _(use):
                        head = kv_head * group + lax.div(use, last - first)
                        rows = pl.ds((first + lax.rem(use, last - first)) * BLOCK, BLOCK)
                        slot = lax.rem(use, call.stages)
                        sync(FIRST_FREE[: call.stages], slot, WITH_LOADER)
                        plgpu.copy_gmem_to_smem(q_g.at[row, rows, head], q_s.at[slot], q_full.at[slot])
                        plgpu.copy_gmem_to_smem(shift_g.at[row, head, rows], shift_s.at[slot], q_full.at[slot])
                        sync(SECOND_FREE[: call.stages], slot, WITH_LOADER)
                        plgpu.copy_gmem_to_smem(do_g.at[row, rows, head], do_s.at[slot], do_full.at[slot])
                        plgpu.copy_gmem_to_smem(delta_g.at[row, head, rows], delta_s.at[slot], do_full.at[slot])

        def compute(wg):
            for slot in range(call.stages):
                arrive(FIRST_FREE, slot, WITH_LOADER)
                arrive(SECOND_FREE, slot, WITH_LOADER)
            mine = pl.ds(wg * ROWS, ROWS)
            base = tile * TILE + wg * ROWS
            if kv_seg_g is not None:
                theirs = plgpu.load(kv_seg_g.at[row, pl.ds(base, ROWS)], layout=PER_ROW, optimized=False)
            plgpu.barrier_wait(kv_full)

            def masked(s, i):
                """-inf where a query (column) does not see a key (row)."""
                key = row_numbers(ROWS) + base
                limit = key - (call.offset + i * BLOCK) if call.causal else jnp.zeros_like(key)
                s = keep_columns(s, jnp.where(key < call.kv_len, limit, _NEVER), up_to=False)
                if kv_seg_g is not None:
                    segments = q_seg_g.at[row, pl.ds(i * BLOCK, BLOCK)]
                    segments = plgpu.load(segments, layout=PER_COLUMN, optimized=False)
                    s = jnp.where(across(theirs, BLOCK) == down(segments, ROWS), s, -jnp.inf)
                return s

            def accumulate(dk, dv):
                def step(i, first_row, member, some_masked):
                    use = member * (last - first) + i - first
                    slot = lax.rem(use, call.stages)

                    square = plgpu.ACC((ROWS, BLOCK), jnp.float32)

                    @functools.partial(pl.run_scoped, s=square)
                    def weights(s):
                        plgpu.barrier_wait(q_full.at[slot])
                        # Where the sum starts, instead of a subtraction after it: no registers held meanwhile.
                        s[...] = down(plgpu.load(shift_s.at[slot], layout=PER_COLUMN), ROWS)
                        if d_rope:
                            plgpu.wgmma(s, k_s.at[mine], q_s.at[slot, :, pl.ds(0, call.d_k)].transpose((1, 0)))
                            q_rope = q_s.at[slot, :, pl.ds(call.d_k, d_rope)]
                            plgpu.wgmma(s, rope_s.at[mine], q_rope.transpose((1, 0)))
                        else:
                            plgpu.wgmma(s, k_s.at[mine], q_s.at[slot].transpose((1, 0)))
                        s = plgpu.wgmma_accumulator_load(s, wait_n=0)
                        s = masked(s, i) if some_masked else s
                        # The barrier keeps the rounding packed, two numbers an instruction.
                        return lax.optimization_barrier(jnp.exp2(s * (call.scale * LOG2E)).astype(jnp.bfloat16))

                    @functools.partial(pl.run_scoped, dp=square)
                    def d_scores(dp):
                        plgpu.barrier_wait(do_full.at[slot])
                        dp[...] = down(plgpu.load(delta_s.at[slot], layout=PER_COLUMN), ROWS)
                        plgpu.wgmma(dp, v_s.at[mine], do_s.at[slot].transpose((1, 0)))
                        plgpu.wgmma(dv, weights, do_s.at[slot])
                        dp = plgpu.wgmma_accumulator_load(dp, wait_n=1)
                        return (weights.astype(jnp.float32) * dp).astype(jnp.bfloat16)

                    plgpu.wgmma(dk, d_scores, q_s.at[slot])
                    if ds_g is not None:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        ds_s[wg] = d_scores
                        plgpu.commit_smem()
                        pair = (row * kv_heads + local) * group + member
                        columns = pl.ds(i * BLOCK, BLOCK)
                        plgpu.copy_smem_to_gmem(ds_s.at[wg], ds_g.at[pair, pl.ds(base, ROWS), columns])
                    plgpu.wgmma_wait(1)
                    arrive(SECOND_FREE[: call.stages], slot, WITH_LOADER)
                    plgpu.wgmma_wait(0)
                    arrive(FIRST_FREE[: call.stages], slot, WITH_LOADER)
                    return first_row + zero

                zero = runtime_zero()

                def one_head(member, first_row):
                    start = first
                    for end, some_masked in ((whole_first, True), (whole_last, False), (last, True)):
                        end = lax.clamp(start, jnp.int32(end), last)
                        body = functools.partial(step, member=member, some_masked=some_masked)
                        first_row = lax.fori_loop(start, end, body, first_row)
                        start = end
                    return first_row

                lax.fori_loop(0, group, one_head, wg * ROWS)
                return dk[...], dv[...]

            accumulators = [plgpu.ACC((ROWS, call.d_qk)), plgpu.ACC((ROWS, call.d_v))]
            dk, dv = pl.run_scoped(accumulate, *accumulators)
            dk *= call.scale
            k_s[mine] = dk[:, : call.d_k].astype(jnp.bfloat16)
            v_s[mine] = dv.astype(jnp.bfloat16)
            if d_rope:
                rope_s[mine] = dk[:, call.d_k :].astype(jnp.bfloat16)
            plgpu.commit_smem()
            for shared, out in ((k_s, dk_g), (v_s, dv_g), (rope_s, d_rope_g)):
                if out is not None:
                    plgpu.copy_smem_to_gmem(shared.at[mine], out.at[row, pl.ds(base, ROWS), local])
            plgpu.wait_smem_to_gmem(0)

        roles(compute, load)

    def result(width):
        return jax.ShapeDtypeStruct((call.batch, k.shape[1], kv_heads, width), jnp.bfloat16)

    scores = (call.batch * kv_heads * group, tiles * TILE, q_tiles * TILE)
    out_type = [
        result(call.d_k),
        result(call.d_v),
        result(d_rope) if d_rope else None,
        jax.ShapeDtypeStruct(scores, jnp.bfloat16) if with_scores else None,
    ]
    scratch = [
        tiled(TILE, call.d_k),
        tiled(TILE, d_rope) if d_rope else None,
        tiled(TILE, call.d_v),
        tiled(call.stages, BLOCK, call.d_qk),
        tiled(call.stages, BLOCK, call.d_v),
        plgpu.SMEM((call.stages, BLOCK), jnp.float32),
        plgpu.SMEM((call.stages, BLOCK), jnp.float32),
        tiled(WARPGROUPS, ROWS, BLOCK) if with_scores else None,
        plgpu.Barrier(num_arrivals=3 if d_rope else 2),
        plgpu.Barrier(num_arrivals=2, num_barriers=call.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=call.stages),
    ]
    run = launch(kernel, "mla_attention_keys_values", call.batch * kv_heads * tiles, out_type, scratch)
    return run(q, k, v, k_rope, d_out, shift, delta, q_segments, kv_segments, ranges)

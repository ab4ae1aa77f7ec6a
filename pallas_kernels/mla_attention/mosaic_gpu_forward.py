"""Forward attention for Hopper in Pallas Mosaic GPU: one persistent kernel.

Per step a warpgroup multiplies `S = Q K^T` [64, block_kv] (bf16 -> float32, K-major operands from shared
memory) and `O += P V` [64, d_v] (P in registers). Two compute warpgroups own 64 query rows each; a third
issues the TMA loads of K and V blocks into `stages` slots. As in FlashAttention-3 (Shah et al. 2024, §3),
`Q K^T` of block j + 1 is in flight while the softmax of block j runs on the other units.

A program walks over (head, query tile) pairs, the longest first within groups of heads whose keys and values
fit in the L2 cache. Blocks of keys outside a tile's visible range are skipped; only those not wholly visible
are masked.
"""

import dataclasses
import functools

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
    down,
    keep_columns,
    row_numbers,
    tiled,
)

COMPUTE_WARPGROUPS = 2
ROWS = 64  # query rows of a compute warpgroup
TILE_Q = COMPUTE_WARPGROUPS * ROWS


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the forward kernel.

    `alternate` makes the two compute warpgroups take turns at issuing matrix products, so that one's softmax
    runs under the other's products. `cluster` 2 lets two blocks with neighbouring query tiles share their loads.
    """

    block_kv: int = 128
    stages: int = 2
    alternate: bool = False
    cluster: int = 1
    l2_bytes: int = 24 * 2**20

    def shared_memory(self, d_qk: int, d_v: int) -> int:
        """Bytes of shared memory the kernel asks for."""
        keys_and_values = self.stages * self.block_kv * (d_qk + d_v)
        return 2 * (TILE_Q * d_qk + keys_and_values + TILE_Q * 64) + 2048


def default_config(d_qk: int, d_v: int) -> Config | None:
    """The tiles for these head widths; None if no tiles fit."""
    for block_kv in (128, 64):
        config = Config(block_kv=block_kv)
        if config.shared_memory(d_qk, d_v) <= SHARED_MEMORY:
            return config
    return None


def forward(q, k, v, k_rope, q_segments, kv_segments, blocks, *, scale, causal, config, multiprocessors):
    """Attention over operands padded to whole TMA boxes.

    Args:
      q: bf16 `[batch, q_len, heads, d_qk]`, q_len a multiple of 8; likewise k `[batch, kv_len, kv_heads, d_k]`,
        v `[..., d_v]` and k_rope `[batch, kv_len, d_rope]` or None.
      q_segments, kv_segments: int32, padded to whole tiles with ids that match nothing; None without segments.
      blocks: int32 `[batch, q tiles, 4]`, for every query tile the key blocks [0] .. [3] to visit, of which
        [1] .. [2] are wholly visible.
      scale: positive factor of the logits.
      causal: (causal or not, kv_len - q_len before padding, kv_len before padding).
      config: the tiles.
      multiprocessors: how many the GPU has; each runs one block.

    Returns:
      The output `[batch, q_len, heads, d_v]`, and the float32 log-sum-exp `[batch, heads, rows of whole tiles]`.
    """
    batch, q_len, heads, d_qk = q.shape
    kv_len, kv_heads, d_k = k.shape[1:]
    d_v = v.shape[-1]
    is_causal, offset, kv_valid = causal
    block_kv, stages, cluster = config.block_kv, config.stages, config.cluster
    q_tiles = pl.cdiv(q_len, TILE_Q)
    q_groups = pl.cdiv(q_tiles, cluster)
    head_pairs = batch * heads
    # Heads walked over together: their keys and values should stay in the L2 cache.
    together = max(1, min(head_pairs, config.l2_bytes // (2 * kv_len * (d_qk + d_v))))
    while head_pairs % together:
        together -= 1
    works = head_pairs * q_groups
    programs = min(multiprocessors // cluster, works)
    exponent_scale = scale * LOG2E

    def tile(index):
        """Which batch row, head and first query tile a work item is."""
        group, within = lax.div(index, together * q_groups), lax.rem(index, together * q_groups)
        rank, member = lax.div(within, together), lax.rem(within, together)
        pair = group * together + member
        q_group = q_groups - 1 - rank if is_causal else rank
        return lax.div(pair, heads), lax.rem(pair, heads), q_group

    def block_range(blocks_gmem, row, q_tile):
        """Key blocks [first, last) that a tile visits, and those of them that are wholly visible."""
        q_tile = lax.min(q_tile, q_tiles - 1)
        if blocks_gmem is not None:
            return tuple(blocks_gmem[row, q_tile, i] for i in range(4))
        count = pl.cdiv(kv_valid, block_kv)
        whole = kv_valid // block_kv
        if not is_causal:
            return 0, 0, whole, count
        first_row = q_tile * TILE_Q + offset  # The last key that the tile's first query sees.
        last = lax.clamp(1, lax.div(first_row + TILE_Q + block_kv - 1, block_kv), count)
        return 0, 0, lax.clamp(0, lax.div(first_row + 1, block_kv), lax.min(last, whole)), last

    def cluster_range(blocks_gmem, row, q_group):
        """Key blocks that at least one tile of the cluster visits."""
        ranges = [block_range(blocks_gmem, row, q_group * cluster + i) for i in range(cluster)]
        first = functools.reduce(lax.min, [jnp.int32(r[0]) for r in ranges])
        last = functools.reduce(lax.max, [jnp.int32(r[3]) for r in ranges])
        return first, last

    def kernel(refs, outs, q_smem, k_smem, rope_smem, v_smem, o_smem, lse_smem, barriers):
        q_gmem, k_gmem, v_gmem, rope_gmem, q_seg_gmem, kv_seg_gmem, blocks_gmem = refs
        out_gmem, lse_gmem = outs
        q_full, q_free, k_full, k_free, v_full, v_free, turn = barriers
        wg = lax.axis_index("wg")
        rank = lax.axis_index("cluster") if cluster > 1 else 0
        first_work, stride = lax.axis_index("program"), programs
        count = lax.div(works - first_work + stride - 1, stride)

        def load(i, step):
            row, head, q_group = tile(first_work + i * stride)
            q_tile = q_group * cluster + rank
            first, last = cluster_range(blocks_gmem, row, q_group)
            kv_head = lax.div(head, heads // kv_heads)
            shared = {"collective_axes": "cluster"} if cluster > 1 else {}

            def body(j, _):
                use = step + j - first
                slot = lax.rem(use, stages)
                keys = pl.ds(j * block_kv, block_kv)

                @pl.when(use >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])

                plgpu.copy_gmem_to_smem(k_gmem.at[row, keys, kv_head], k_smem.at[slot], k_full.at[slot], **shared)
                if rope_smem is not None:
                    plgpu.copy_gmem_to_smem(rope_gmem.at[row, keys], rope_smem.at[slot], k_full.at[slot], **shared)

                @pl.when(j == first)
                def _():
                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_wait(q_free)

                    plgpu.copy_gmem_to_smem(q_gmem.at[row, pl.ds(q_tile * TILE_Q, TILE_Q), head], q_smem, q_full)

                @pl.when(use >= stages)
                def _():
                    plgpu.barrier_wait(v_free.at[slot])

                plgpu.copy_gmem_to_smem(v_gmem.at[row, keys, kv_head], v_smem.at[slot], v_full.at[slot], **shared)
                return ()

            lax.fori_loop(first, last, body, ())
            return step + last - first

        def compute(i, step):
            row, head, q_group = tile(first_work + i * stride)
            q_tile = q_group * cluster + rank
            first, last = cluster_range(blocks_gmem, row, q_group)
            _, whole_first, whole_last, _ = block_range(blocks_gmem, row, q_tile)
            q_rows = pl.ds(wg * ROWS, ROWS)
            base = q_tile * TILE_Q + wg * ROWS
            if q_seg_gmem is not None:
                mine = plgpu.load(q_seg_gmem.at[row, pl.ds(base, ROWS)], layout=PER_ROW, optimized=False)

            def masked(s, j):
                limit = plgpu.layout_cast(jnp.full((ROWS,), kv_valid - 1 - j * block_kv, jnp.int32), PER_ROW)
                if is_causal:
                    limit = jnp.minimum(limit, row_numbers(ROWS) + (base + offset - j * block_kv))
                s = keep_columns(s, limit, up_to=True)
                if q_seg_gmem is not None:
                    keys = kv_seg_gmem.at[row, pl.ds(j * block_kv, block_kv)]
                    theirs = plgpu.load(keys, layout=PER_COLUMN, optimized=False)
                    s = jnp.where(across(mine, block_kv) == down(theirs, ROWS), s, -jnp.inf)
                return s

            def softmax(s, peak, total, some_masked):
                """Weights 2^(c s - peak) of this block, the new maximum and sum, and the old ones' factor."""
                new_peak = jnp.maximum(peak, s.max(axis=1) * exponent_scale)
                # A row that has seen nothing keeps -inf: subtract 0 there, so that no NaN arises.
                below = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if some_masked else new_peak
                weights = jnp.exp2(s * exponent_scale - across(below, block_kv))
                factor = jnp.exp2(peak - below)
                return weights, new_peak, total * factor + weights.sum(axis=1), factor

            def start_scores(acc, slot):
                rows = q_smem.at[q_rows]
                if rope_smem is None:
                    plgpu.wgmma(acc, rows, k_smem.at[slot].transpose((1, 0)))
                else:
                    plgpu.wgmma(acc, rows.at[:, pl.ds(0, d_k)], k_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(acc, rows.at[:, pl.ds(d_k, d_qk - d_k)], rope_smem.at[slot].transpose((1, 0)))

            def release_scores(slot, j):
                plgpu.barrier_arrive(k_free.at[slot])

                @pl.when(j == last - 1)
                def _():
                    plgpu.barrier_arrive(q_free)

            def take_turn():
                if config.alternate:
                    plgpu.barrier_wait(turn.at[wg])

            def give_turn():
                if config.alternate:
                    plgpu.barrier_arrive(turn.at[1 - wg])

            def scoped(out):
                def first_scores(acc):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(q_full)
                    plgpu.barrier_wait(k_full.at[slot])
                    take_turn()
                    start_scores(acc, slot)
                    give_turn()
                    return plgpu.wgmma_accumulator_load(acc, wait_n=0)

                s = pl.run_scoped(first_scores, plgpu.ACC((ROWS, block_kv), jnp.float32))
                release_scores(lax.rem(step, stages), first)
                peak = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
                carry = softmax(masked(s, first), peak, total, True)

                def settle(weights, factor, j):
                    """Rescales the output once the values of block j have arrived in it; rounds the weights."""
                    result = plgpu.wgmma_accumulator_load(out, wait_n=0)

                    @pl.when(j >= first)
                    def _():
                        plgpu.barrier_arrive(v_free.at[lax.rem(step + j - first, stages)])

                    out[...] = result * across(factor, d_v)
                    return weights.astype(jnp.bfloat16)

                def start_output(weights, j):
                    slot = lax.rem(step + j - first, stages)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.wgmma(out, weights, v_smem.at[slot])

                def body(j, carry, some_masked):
                    weights, peak, total, factor = carry
                    slot = lax.rem(step + j - first, stages)
                    weights = settle(weights, factor, j - 2)

                    def products(acc):
                        plgpu.barrier_wait(k_full.at[slot])
                        take_turn()
                        start_scores(acc, slot)
                        start_output(weights, j - 1)
                        give_turn()
                        return plgpu.wgmma_accumulator_load(acc, wait_n=1)

                    s = pl.run_scoped(products, plgpu.ACC((ROWS, block_kv), jnp.float32))
                    release_scores(slot, j)
                    return softmax(masked(s, j) if some_masked else s, peak, total, some_masked)

                bounds = [first + 1]
                for bound in (whole_first, whole_last, last):
                    bounds.append(lax.clamp(bounds[-1], jnp.int32(bound), last))
                for start, stop, some_masked in zip(bounds, bounds[1:], (True, False, True), strict=False):
                    if some_masked and start is bounds[0] and blocks_gmem is None:
                        continue  # Without segments the wholly visible blocks come first.
                    carry = lax.fori_loop(start, stop, functools.partial(body, some_masked=some_masked), carry)
                weights, peak, total, factor = carry
                start_output(settle(weights, factor, last - 2), last - 1)
                result = plgpu.wgmma_accumulator_load(out, wait_n=0)
                plgpu.barrier_arrive(v_free.at[lax.rem(step + last - first - 1, stages)])
                return result, peak, total

            result, peak, total = pl.run_scoped(scoped, plgpu.ACC((ROWS, d_v), jnp.float32))
            seen = total > 0
            result *= across(jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0), d_v)
            lse = jnp.where(seen, (peak + jnp.log2(jnp.where(seen, total, 1.0))) / LOG2E, -jnp.inf)
            for part in range(d_v // 64):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem[wg] = result[:, part * 64 : (part + 1) * 64].astype(jnp.bfloat16)
                if part == 0:
                    lse_smem[wg] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    o_smem.at[wg], out_gmem.at[row, pl.ds(base, ROWS), head, pl.ds(part * 64, 64)], commit_group=False
                )
                if part == 0:
                    plgpu.copy_smem_to_gmem(
                        lse_smem.at[wg], lse_gmem.at[row, head, pl.ds(base, ROWS)], commit_group=False
                    )
                plgpu.commit_smem_to_gmem_group()
            return step + last - first

        @pl.when(wg < COMPUTE_WARPGROUPS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            if config.alternate:
                pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            lax.fori_loop(0, count, compute, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == COMPUTE_WARPGROUPS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            loads = lax.fori_loop(0, count, load, jnp.int32(0))
            if cluster > 1:  # The other block may still signal this one's barriers: stay until it has.

                @pl.loop(jnp.maximum(loads - stages, 0), loads)
                def _(use):
                    plgpu.barrier_wait(k_free.at[lax.rem(use, stages)])
                    plgpu.barrier_wait(v_free.at[lax.rem(use, stages)])

    def entry(*args):
        n = 4 + 3
        kernel(args[:n], args[n : n + 2], *args[n + 2 :])

    def free(arrivals):
        if cluster == 1:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
        return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=arrivals, num_barriers=stages)

    scratch = [
        tiled(TILE_Q, d_qk),
        tiled(stages, block_kv, d_k),
        None if k_rope is None else tiled(stages, block_kv, d_qk - d_k),
        tiled(stages, block_kv, d_v),
        tiled(COMPUTE_WARPGROUPS, ROWS, 64),
        plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32),
        (
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_arrivals=1 if k_rope is None else 2, num_barriers=stages),
            free(COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_barriers=stages),
            free(COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS) if config.alternate else None,
        ),
    ]
    clusters = {"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}
    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct((batch, q_len, heads, d_v), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, q_groups * cluster * TILE_Q), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **clusters,
    )(q, k, v, k_rope, q_segments, kv_segments, blocks)

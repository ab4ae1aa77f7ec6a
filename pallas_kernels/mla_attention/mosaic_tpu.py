"""Attention on TPU: the splash attention kernels that JAX ships (Pallas Mosaic TPU), at our contract.

They skip blocks that the causal mask hides, and mask documents by their ids. The scale enters the queries,
which are rounded once more for it. The key shared by the heads is copied to every head.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels import implementations
from pallas_kernels.mla_attention.cudnn import without_gradient

BLOCK = 512  # queries, and keys, of a block; multiples of 128
_LANES = 128


def unsupported(q, k, v, k_rope, q_segments, kv_segments, *, causal) -> str | None:
    """Why this implementation cannot run the call, with the nearest supported choice."""
    del k_rope
    if implementations.platform() != "tpu":
        return f"it runs on TPU, not on {implementations.platform()}; use 'chunked' or 'reference'"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; it takes all bfloat16 or float32; use 'chunked'"
    if 0 in q.shape or 0 in k.shape:
        return "an empty axis; use 'chunked'"
    if causal and q.shape[1] > k.shape[1]:
        return f"q_len {q.shape[1]} exceeds kv_len {k.shape[1]}: some queries see nothing; use 'chunked'"
    if q_segments is not kv_segments:
        return "with kv_segment_ids of their own some queries may see nothing; use 'chunked'"
    return None


def attention(q, k, v, k_rope, q_segments, kv_segments, *, scale, causal, interpret=False, block=BLOCK):
    """Returns the output `[batch, q_len, heads, d_v]` and the log-sum-exp `[batch, heads, q_len]`."""
    if k_rope is not None:
        shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
        k = jnp.concatenate([k, shared], -1)
    q_len, kv_len = q.shape[1], k.shape[1]
    q_block, kv_block = (min(block, -(-length // _LANES) * _LANES) for length in (q_len, kv_len))
    q, k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % size), (0, 0)))
        for x, size in ((q * scale, q_block), (k, kv_block), (v, kv_block))
    )
    padded = q.shape[2], k.shape[2]
    if q_segments is None and not causal and padded[1] > kv_len:
        batch = q.shape[0]
        q_segments, kv_segments = jnp.zeros((batch, q_len), jnp.int32), jnp.zeros((batch, kv_len), jnp.int32)
    segments = None
    if q_segments is not None:
        # Padding is a document of its own.
        low = jnp.minimum(jnp.min(q_segments), jnp.min(kv_segments)) - 1
        segments = splash.SegmentIds(
            _padded(q_segments, padded[0], low), _padded(kv_segments, padded[1], low)
        )
    mask = masks.CausalMask(padded, offset=kv_len - q_len) if causal else masks.FullMask(padded)

    def run(q, k, v, with_lse):
        # Built anew for every trace: the kernel holds arrays of it.
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=_sizes(q_block, kv_block),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=with_lse,
            # Names the output and the log-sum-exp that the backward pass reads.
            residual_checkpoint_name="attention_out",
            interpret=interpret,
        )
        return jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)

    out = run(q, k, v, False)
    # Dropped by the compiler where nobody reads it: the kernel that is differentiable does not return it.
    _, (lse,) = run(*jax.lax.stop_gradient((q, k, v)), True)
    return out[:, :, :q_len].swapaxes(1, 2), without_gradient(lse[..., :q_len], q, "mosaic_tpu")


def _padded(ids, length, value):
    return jnp.concatenate([ids, jnp.full((ids.shape[0], length - ids.shape[1]), value, ids.dtype)], 1)


def _sizes(q_block, kv_block):
    return splash.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )

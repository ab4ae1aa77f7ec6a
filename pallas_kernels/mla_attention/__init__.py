"""Softmax attention in the expanded form of multi-head latent attention (DeepSeek-V3 §2.1.1, eq 10).

Query and key heads may be wider than value heads (192 and 128 in DeepSeek-V3), key and value heads
may be fewer than query heads (GQA, MQA), and the decoupled RoPE key, one for all heads, may be
passed on its own so that no copy of it is made for every head.
"""

import functools
import math

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import implementations
from pallas_kernels.mla_attention import chunked, cudnn, mosaic_gpu, mosaic_tpu, reference, strips

# Each module offers `attention(q, k, v, k_rope, q_segments, kv_segments, *, scale, causal)` that
# returns (output, log-sum-exp) and is differentiable, and `unsupported(q, k, v, k_rope, ...)`.
_MODULES = {
    "reference": reference,
    "strips": strips,
    "chunked": chunked,
    "cudnn": cudnn,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
}
IMPLEMENTATIONS = tuple(_MODULES)

# The reference keeps every score: up to this many (256 MiB in float32) "auto" prefers it to "chunked".
_FEW_SCORES = 2**26


def _preference(q, k):
    scores = math.prod(q.shape[:3]) * k.shape[1]
    plain = ("reference",) if scores <= _FEW_SCORES else ("chunked",)
    alone = implementations.on_one_device()
    gpu = ("mosaic_gpu", "cudnn") if alone else ("cudnn",)
    tpu = ("mosaic_tpu",) if alone else ()
    # On CPU autodiff through the softmax takes longer than their backward passes, at any length.
    return {"cpu": ("strips", "chunked"), "gpu": (*gpu, *plain), "tpu": (*tpu, *plain)}


def mla_attention(
    q: Float[Array, "batch q_len heads d_qk"],
    k: Float[Array, "batch kv_len kv_heads d_k"],
    v: Float[Array, "batch kv_len kv_heads d_v"],
    *,
    k_rope: Float[Array, "batch kv_len d_rope"] | None = None,
    scale: float | None = None,
    causal: bool = True,
    segment_ids: Int[Array, "batch q_len"] | None = None,
    kv_segment_ids: Int[Array, "batch kv_len"] | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "batch q_len heads d_v"] | tuple[Array, Float[Array, "batch heads q_len"]]:
    """`softmax(scale * q k^T + mask) v`, head by head.

    Args:
      q: queries.
      k: keys; head h of q attends with key head `h // (heads // kv_heads)`. `d_k` is `d_qk`, or
        `d_qk - d_rope` when `k_rope` is given.
      v: values.
      k_rope: the shared part of the key: key head i is `concat(k[:, :, i], k_rope)`.
      scale: factor of the logits; `d_qk ** -0.5` by default.
      causal: query i sees keys up to `i + kv_len - q_len` (the ends are aligned).
      segment_ids: attend within equal ids only (packed documents).
      kv_segment_ids: ids of the keys; those of the queries by default (then `q_len == kv_len`).
      return_lse: also return the float32 log-sum-exp of the scaled, masked logits.
      implementation: `"auto"`, or one by name: `"reference"` (every score at once), `"strips"`
        (plain JAX, unrolled, up to 1024 positions), `"chunked"` (plain JAX, memory linear in the length),
        `"cudnn"` (GPU; no segment ids, no gradient through the log-sum-exp), `"mosaic_gpu"` (Hopper, bf16;
        our kernels) or `"mosaic_tpu"` (TPU; JAX's kernels, no gradient through the log-sum-exp).

    Returns:
      The output in the dtype of q; a query that sees no key gets 0 and log-sum-exp -inf. Both carry names for
      `jax.checkpoint` policies, "attention_out" and "attention_lse": kept, they spare the backward pass a
      second forward pass.

    Raises:
      ValueError: shapes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    _check_shapes(q, k, v, k_rope, segment_ids, kv_segment_ids)
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    arrays = (q, k, v, k_rope, segment_ids, kv_segment_ids)
    constraints = {
        name: functools.partial(module.unsupported, *arrays, causal=causal)
        for name, module in _MODULES.items()
    }
    chosen = implementations.choose("mla_attention", implementation, constraints, _preference(q, k))
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    with jax.named_scope(f"mla_attention_{chosen}"):
        out, lse = _MODULES[chosen].attention(*arrays, scale=scale, causal=causal)
    return (out, lse) if return_lse else out


def _check_shapes(q, k, v, k_rope, segment_ids, kv_segment_ids):
    def fail(problem):
        raise ValueError(f"mla_attention: {problem} (q {q.shape}, k {k.shape}, v {v.shape})")

    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        fail("q, k and v must be [batch, length, heads, width]")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]):
        fail("q, k and v need the same batch, k and v the same length and heads")
    if q.shape[2] % k.shape[2]:
        fail(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    shared = 0
    if k_rope is not None:
        shared = k_rope.shape[-1]
        if k_rope.shape != (*k.shape[:2], shared):
            fail(f"k_rope {k_rope.shape} must be [batch, kv_len, d_rope]")
    if q.shape[-1] != k.shape[-1] + shared:
        fail(f"query width {q.shape[-1]} differs from key width {k.shape[-1]} + shared {shared}")
    if segment_ids is None and kv_segment_ids is not None:
        fail("kv_segment_ids needs segment_ids")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        fail(f"segment_ids {segment_ids.shape} must be [batch, q_len]")
    kv_shape = None if kv_segment_ids is None else kv_segment_ids.shape
    if kv_segment_ids is None and segment_ids is not None and q.shape[1] != k.shape[1]:
        fail("q_len and kv_len differ, so kv_segment_ids is needed")
    if kv_shape is not None and kv_shape != k.shape[:2]:
        fail(f"kv_segment_ids {kv_shape} must be [batch, kv_len]")

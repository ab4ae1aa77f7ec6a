"""Softmax attention of whole sequences, under a mesh on each device's own part of the batch."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.mesh import current_mesh, spec
from pallas_kernels import mla_attention


def attend(
    q: Float[Array, "batch seq heads d_qk"],
    k: Float[Array, "batch seq kv_heads d_k"],
    v: Float[Array, "batch seq kv_heads d_v"],
    k_rope: Float[Array, "batch seq rope"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    scale: float,
    implementation: str,
) -> Float[Array, "batch seq heads d_v"]:
    """`mla_attention`, causal. The partitioner cannot split a kernel, so every device calls its own."""

    def local(q, k, v, k_rope, segment_ids) -> Any:
        options = {"k_rope": k_rope, "segment_ids": segment_ids, "implementation": implementation}
        return mla_attention(q, k, v, scale=scale, **options)  # Without its log-sum-exp: one array.

    mesh = current_mesh()
    if mesh is None:
        return local(q, k, v, k_rope, segment_ids)
    batch = spec("batch")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)
    return mapped(q, k, v, k_rope, segment_ids)

"""Decoding attention over the latent cache: the absorbed form of MLA (DeepSeek-V2 §2.1.2; DeepSeek-V3 eq 10).

With the key's up-projection absorbed into the query, and the value's left to the caller, all heads attend
over one key of width rank + rope a token, and the value is that key's first rank columns.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import implementations
from pallas_kernels.mla_decode import blocked, mosaic_gpu, mosaic_tpu, reference

# Each module offers `attention(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale, *, scale)`
# that returns (output, log-sum-exp), and `unsupported` of the same arrays.
_MODULES = {"reference": reference, "blocked": blocked, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
IMPLEMENTATIONS = tuple(_MODULES)
QUANTISED = (jnp.int8, jnp.float8_e4m3fn)


def mla_decode(
    q: Float[Array, "batch s_q heads width"],
    c_kv: Shaped[Array, "rows slots rank"],
    k_rope: Shaped[Array, "rows slots rope"],
    lengths: Int32[Array, "batch"],
    *,
    scale: float,
    page_table: Int32[Array, "batch max_pages"] | None = None,
    c_kv_scale: Float32[Array, "rows slots"] | None = None,
    k_rope_scale: Float32[Array, "rows slots"] | None = None,
    alike: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch s_q heads rank"], Float32[Array, "batch s_q heads"]]:
    """`softmax(scale * q [c_kv, k_rope]^T) c_kv` over the valid entries of a cache.

    The s_q queries of a sequence are its newest tokens, whose entries are in the cache already: query j sees
    the positions below `lengths - s_q + j + 1`.

    Args:
      q: queries, `concat(q_nope W_UK, q_rope)`, of width rank + rope.
      c_kv: normalised latents. Contiguous: rows are the batch, slots the capacity. Paged: rows are pages,
        slots the entries of a page. bf16, fp16 or float32, or quantised: int8 or float8_e4m3fn.
      k_rope: the rotated keys that all heads share, in the same rows, slots and dtype.
      lengths: valid entries of each sequence, the new tokens' included. A query that sees nothing (length 0)
        gets 0 and log-sum-exp -inf. Entries beyond the length do not count, but must be finite.
      scale: factor of the logits; `(d_nope + d_rope) ** -0.5` in DeepSeek-V3, times YaRN's where it applies.
      page_table: the pages of each sequence in order; entries beyond its length are not read.
      c_kv_scale: factor of each entry of a quantised c_kv; required for those and for no others.
      k_rope_scale: likewise for k_rope.
      alike: a query finds the same to the bit whatever the other sequences' lengths are and however many
        queries come together, the number of sequences being the same. Lengths that differ much, and several
        queries, cost more then. `"mosaic_tpu"` is as it is.
      implementation: `"auto"`, or one by name: `"reference"` (the whole capacity at once, float32),
        `"blocked"` (plain JAX, a block at a time up to the longest length), `"mosaic_gpu"` (Hopper, bf16
        queries) or `"mosaic_tpu"` (TPU); the last two are our kernels.

    Returns:
      The output in the dtype of q, and the log-sum-exp of the scaled, masked logits.

    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` does not exist.
      UnsupportedError: the named implementation cannot run this call.
    """
    arrays = (q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale)
    _check(*arrays)
    constraints = {name: functools.partial(module.unsupported, *arrays) for name, module in _MODULES.items()}
    preference: dict[str, tuple[str, ...]] = {name: ("blocked",) for name in ("cpu", "gpu", "tpu")}
    if implementations.on_one_device():
        preference |= {"gpu": ("mosaic_gpu", "blocked"), "tpu": ("mosaic_tpu", "blocked")}
    chosen = implementations.choose("mla_decode", implementation, constraints, preference)
    with jax.named_scope(f"mla_decode_{chosen}"):
        if chosen == "mosaic_gpu":
            return mosaic_gpu.attention(*arrays, scale=float(scale), alike=alike)
        attention = functools.partial(_MODULES[chosen].attention, scale=float(scale))
        if not alike or chosen == "mosaic_tpu":  # There each query has rows of its own, in one program.
            return attention(*arrays)
        found = [
            attention(q[:, i : i + 1], *arrays[1:3], lengths - q.shape[1] + i + 1, *arrays[4:])
            for i in range(q.shape[1])
        ]
        out, lse = (jnp.concatenate(parts, 1) for parts in zip(*found, strict=True))
        return out, lse


def _check(q, c_kv, k_rope, lengths, page_table, c_kv_scale, k_rope_scale):
    def fail(problem):
        raise ValueError(f"mla_decode: {problem} (q {q.shape}, c_kv {c_kv.shape}, k_rope {k_rope.shape})")

    if q.ndim != 4 or c_kv.ndim != 3 or k_rope.ndim != 3:
        fail("q must be [batch, s_q, heads, width], c_kv and k_rope [rows, slots, width]")
    if c_kv.shape[:2] != k_rope.shape[:2] or c_kv.dtype != k_rope.dtype:
        fail(f"c_kv and k_rope need the same rows, slots and dtype ({c_kv.dtype}, {k_rope.dtype})")
    if q.shape[-1] != c_kv.shape[-1] + k_rope.shape[-1]:
        fail(f"query width {q.shape[-1]} is not the widths of c_kv and k_rope together")
    if lengths.shape != q.shape[:1]:
        fail(f"lengths {lengths.shape} must be [batch]")
    if page_table is None and c_kv.shape[0] != q.shape[0]:
        fail("a contiguous cache has one row a sequence; pass page_table for a paged one")
    if page_table is not None and (page_table.ndim != 2 or page_table.shape[0] != q.shape[0]):
        fail(f"page_table {page_table.shape} must be [batch, max_pages]")
    quantised = c_kv.dtype in QUANTISED
    if not quantised and not jnp.issubdtype(c_kv.dtype, jnp.floating):
        fail(f"a cache of {c_kv.dtype}: use bfloat16, float16, float32, int8 or float8_e4m3fn")
    for name, scales in (("c_kv_scale", c_kv_scale), ("k_rope_scale", k_rope_scale)):
        if (scales is not None) != quantised:
            fail(f"{name} goes with int8 and float8_e4m3fn caches, and with those only; this is {c_kv.dtype}")
        if scales is not None and scales.shape != c_kv.shape[:2]:
            fail(f"{name} {scales.shape} must be [rows, slots]")

"""What generation keeps of the tokens it has read: the latent cache, contiguous or paged.

MLA caches (c_KV, k_R) of a token (DeepSeek-V3 §2.1.1). The baselines cache (v, k) of every key/value head in
the same two arrays: their attention is that of a latent whose query is zero over the value,
`[0, q] . [v, k] = q . k`, so one attention and one cache serve all. A key/value head is a *stream*, a
sequence of its own in the arrays; MLA has one.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import kv_heads

# Largest magnitude of each quantised dtype.
_LIMITS = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
DTYPES: dict[str, Any] = {
    "fp32": jnp.float32,
    "bf16": jnp.bfloat16,
    "fp16": jnp.float16,
    "fp8": jnp.float8_e4m3fn,
    "int8": jnp.int8,
}


@no_type_check  # Of JAX's trees, whose leaves may be shapes.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's entries; `rows slots` is `batch*streams capacity`; paged, `streams*pages page_size`."""

    c_kv: Shaped[Array, "rows slots rank"]
    k_rope: Shaped[Array, "rows slots rope"]
    c_kv_scale: Float[Array, "rows slots"] | None  # Quantised caches only: float32, one a token.
    k_rope_scale: Float[Array, "rows slots"] | None


@no_type_check  # Of JAX's trees, whose leaves may be shapes.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """The cache of a batch.

    Attributes:
      layers: the model's layers, then the MTP depths that draft.
      lengths: tokens of each sequence that every layer of the model has read.
      page_table: the pages of each sequence in order, for every layer and stream; None when contiguous.
      streams: 1 for MLA, else the key/value heads.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " batch"]
    page_table: Int[Array, "batch max_pages"] | None
    streams: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        slots = self.layers[0].c_kv.shape[1]
        return slots if self.page_table is None else slots * self.page_table.shape[1]


def widths(config: ModelConfig) -> tuple[int, int, int]:
    """(streams, rank, rope): a token's elements in one layer are `streams * (rank + rope)`."""
    a = config.attention
    if a.kind == "mla":
        return 1, a.kv_lora_rank, a.qk_rope_head_dim
    return kv_heads(a), a.head_dim, a.head_dim


def bytes_per_token(config: ModelConfig, dtype: str = "bf16", drafts: int = 0) -> int:
    """Bytes that a token adds to the cache, over all layers and drafting depths, scales included."""
    streams, rank, rope = widths(config)
    element = jnp.dtype(DTYPES[dtype])
    scales = 2 * 4 if element in _LIMITS else 0
    return (config.n_layers + drafts) * streams * ((rank + rope) * element.itemsize + scales)


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: str = "bf16",
    *,
    page_size: int = 0,
    n_pages: int = 0,
    drafts: int = 0,
) -> LatentCache:
    """An empty cache.

    Args:
      config: the model.
      batch: sequences.
      capacity: tokens that a sequence has room for.
      dtype: a key of `DTYPES`.
      page_size: entries of a page; 0 is contiguous. A paged cache starts with no page given to a
        sequence: its table, all 0, is the caller's to fill (`generation.pages`).
      n_pages: pages in all, shared by the sequences; 0 is as many as `batch` full sequences need.
      drafts: MTP depths that draft, each with a cache of its own.
    """
    streams, rank, rope = widths(config)
    rows, slots, table = batch * streams, capacity, None
    if page_size:
        max_pages = -(-capacity // page_size)
        rows, slots = streams * (n_pages or batch * max_pages), page_size
        table = jnp.zeros((batch, max_pages), jnp.int32)
    element = jnp.dtype(DTYPES[dtype])

    def layer() -> LayerCache:  # Arrays of its own, since a step donates them.
        scales = [jnp.ones((rows, slots), jnp.float32) if element in _LIMITS else None for _ in range(2)]
        return LayerCache(
            jnp.zeros((rows, slots, rank), element), jnp.zeros((rows, slots, rope), element), *scales
        )

    layers = tuple(layer() for _ in range(config.n_layers + drafts))
    return LatentCache(layers, jnp.zeros(batch, jnp.int32), table, streams)


def quantise(x: Float[Array, "*batch d"], dtype: Any) -> tuple[Array, Array | None]:
    """x in `dtype`, and for int8 and fp8 the float32 scale of each vector, amax / limit."""
    limit = _LIMITS.get(jnp.dtype(dtype))
    if limit is None:
        return x.astype(dtype), None
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(-1), 1e-12) / limit
    codes = wide / scale[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        codes = jnp.round(codes)
    return jnp.clip(codes, -limit, limit).astype(dtype), scale


def dequantise(x: Array, scale: Array | None, dtype: Any) -> Array:
    """The inverse of `quantise`, in `dtype`."""
    if scale is None:
        return x.astype(dtype)
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


def places(
    cache: LatentCache, positions: Int[Array, "batch seq"], valid: Array
) -> Int[Array, "batch streams seq"]:
    """Where the entries of `positions` are among all `rows * slots`; out of range where not `valid`."""
    rows, slots = cache.layers[0].c_kv.shape[:2]
    batch = positions.shape[0]
    valid = valid & (positions >= 0) & (positions < cache.capacity)
    inside = jnp.clip(positions, 0, cache.capacity - 1)
    stream = jnp.arange(cache.streams)[:, None]
    if cache.page_table is None:
        row = jnp.arange(batch)[:, None, None] * cache.streams + stream
        flat = row * slots + inside[:, None]
    else:
        page = jnp.take_along_axis(cache.page_table, inside // slots, axis=1)[:, None]
        flat = (stream * (rows // cache.streams) + page) * slots + inside[:, None] % slots
    return jnp.where(valid[:, None], flat, rows * slots)


def write(
    layer: LayerCache,
    where: Int[Array, "batch streams seq"],
    c_kv: Float[Array, "batch seq streams rank"],
    k_rope: Float[Array, "batch seq streams rope"],
) -> LayerCache:
    """The layer with new entries; those whose place is out of range are dropped."""

    def put(old: Array | None, new: Array | None) -> Array | None:
        if old is None or new is None:
            return old
        flat = old.reshape(-1, *old.shape[2:])
        rows = jnp.swapaxes(new, 1, 2).reshape(-1, *new.shape[3:])
        return flat.at[where.reshape(-1)].set(rows, mode="drop").reshape(old.shape)

    codes, scale = quantise(c_kv, layer.c_kv.dtype)
    rope_codes, rope_scale = quantise(k_rope, layer.k_rope.dtype)
    return LayerCache(
        put(layer.c_kv, codes),  # pyright: ignore[reportArgumentType]
        put(layer.k_rope, rope_codes),  # pyright: ignore[reportArgumentType]
        put(layer.c_kv_scale, scale),
        put(layer.k_rope_scale, rope_scale),
    )


def as_stored(x: Float[Array, "*batch d"], layer: LayerCache) -> Float[Array, "*batch d"]:
    """x as the cache will give it back, in the dtype of x."""
    return dequantise(*quantise(x, layer.c_kv.dtype), x.dtype)


def read(
    cache: LatentCache, layer: LayerCache, start: Array, size: int, dtype: Any
) -> tuple[Float[Array, "batch size streams rank"], Float[Array, "batch size streams rope"]]:
    """The entries of positions `start` to `start + size - 1` of every sequence, in `dtype`."""
    batch = cache.lengths.shape[0]
    positions = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
    where = places(cache, positions, jnp.ones_like(positions, bool))

    def take(array: Array | None) -> Array | None:
        if array is None:
            return None
        flat = array.reshape(-1, *array.shape[2:])
        return jnp.swapaxes(jnp.take(flat, where, axis=0, mode="clip"), 1, 2)

    def get(array: Array, scale: Array | None) -> Array:
        return dequantise(take(array), take(scale), dtype)  # pyright: ignore[reportArgumentType]

    return get(layer.c_kv, layer.c_kv_scale), get(layer.k_rope, layer.k_rope_scale)

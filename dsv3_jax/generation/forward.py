"""The model over a cache: prefill of a chunk, decoding of the newest tokens, drafting by the MTP depths."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation.attention import absorbed, expanded
from dsv3_jax.generation.cache import LatentCache, LayerCache, places
from dsv3_jax.generation.experts import moe
from dsv3_jax.generation.linear import Rows, alike, as_rows, linear, rows_of
from dsv3_jax.generation.weights import Weights
from dsv3_jax.model.attention import rope_dim
from dsv3_jax.model.layers import rms_norm, swiglu
from dsv3_jax.model.rope import Rotation, rotation


class Reading(NamedTuple):
    """What all layers need to know of the tokens that are read.

    Attributes:
      cache: without layers.
      turn: rotation of their positions.
      where: places of their entries.
      at: in the expanded form the chunk's first position; in the absorbed one the entries of each sequence.
    """

    cache: LatentCache
    turn: Rotation
    where: Int[Array, "batch streams seq"]
    at: Int[Array, "*batch"]


# Traced once for layers that are alike.
@functools.partial(jax.jit, static_argnames=("config", "block", "rows"))
def _block(
    w: Any,
    x: Array,
    layer: LayerCache,
    reading: Reading,
    config: ModelConfig,
    block: int | None,
    rows: Rows | None = None,
) -> tuple[Array, LayerCache]:
    """A pre-norm block: `x + attention(norm(x))`, then `x + ffn(norm(x))`.

    `block` is that of the expanded form; None is the absorbed form, of tokens laid out as `rows` says.
    """
    cache = replace(reading.cache, layers=(layer,))
    with jax.named_scope("attention"):
        normal = alike(rms_norm, rows, x, w["attention_norm"], config.norm_eps)
        parts = (w["attention"], normal, reading.turn, cache, reading.where, reading.at)
        out, layer = absorbed(*parts, config, rows) if block is None else expanded(*parts, block, config)
        x = x + out
    normal = alike(rms_norm, rows, x, w["ffn_norm"], config.norm_eps)
    if "moe" in w:
        with jax.named_scope("moe"):
            return x + moe(w["moe"], normal, config.moe, rows), layer
    with jax.named_scope("dense_ffn"):
        return x + linear(swiglu(linear(normal, w["ffn"]["gate_up"], rows)), w["ffn"]["down"], rows), layer


def _merge(w: Any, hidden: Array, embedded: Array, config: ModelConfig) -> Array:
    """The input of an MTP depth (DeepSeek-V3 eq 21; the embedding first, as in `model.transformer`)."""
    if "merge" not in w:
        return hidden  # A parallel head.
    both = [
        rms_norm(embedded, w["embedding_norm"], config.norm_eps),
        rms_norm(hidden, w["hidden_norm"], config.norm_eps),
    ]
    return linear(jnp.concatenate(both, -1), w["merge"])


def head(weights: Weights, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
    """Logits in float32."""
    return linear(hidden, weights.head, wide=True)


def prefill(
    weights: Weights,
    cache: LatentCache,
    tokens: Int[Array, "batch chunk_ahead"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
    config: ModelConfig,
    *,
    block: int,
    drafts: int = 0,
) -> tuple[Float[Array, "batch chunk d"], LatentCache]:
    """Reads a chunk of every prompt into the cache, in the expanded form.

    Args:
      weights: of the model.
      cache: its `lengths` are left for the caller to advance.
      tokens: the tokens of positions `start` on: the chunk, and `drafts` more, to which the MTP depths look
        ahead. What lies past a prompt's end may be anything.
      start: position of the chunk, the same for all sequences, a multiple of `block`.
      lengths: tokens of each whole prompt; positions from there on are not written.
      config: the model.
      block: cached positions that are expanded at a time.
      drafts: MTP depths to fill too.

    Returns:
      The hidden states after the final norm, and the cache.
    """
    chunk = tokens.shape[1] - drafts
    positions = jnp.broadcast_to(start + jnp.arange(chunk), (tokens.shape[0], chunk))
    where = places(cache, positions, positions < lengths[:, None])
    turn = rotation(config.rope, rope_dim(config.attention), positions)
    reading = Reading(replace(cache, layers=()), turn, where, start)
    x = weights.embedding[tokens[:, :chunk]]
    hidden, layers = _main(weights, x, cache, reading, config, block)
    state = hidden
    for k, w in enumerate(weights.depths[:drafts], start=1):
        merged = _merge(w, state, weights.embedding[tokens[:, k : k + chunk]], config)
        layer = cache.layers[config.n_layers + k - 1]
        out, layer = _block(w["block"], merged, layer, reading, config, block)
        layers.append(layer)
        if "merge" in w:
            state = rms_norm(out, w["norm"], config.norm_eps)
    layers += cache.layers[len(layers) :]
    return hidden, replace(cache, layers=tuple(layers))


def _main(
    weights: Weights,
    x: Array,
    cache: LatentCache,
    reading: Reading,
    config: ModelConfig,
    block: int | None,
    rows: Rows | None = None,
) -> tuple[Array, list[LayerCache]]:
    layers = []
    for w, layer in zip(weights.layers, cache.layers[: config.n_layers], strict=True):
        x, layer = _block(w, x, layer, reading, config, block, rows)
        layers.append(layer)
    return alike(rms_norm, rows, x, weights.final_norm, config.norm_eps), layers


def _newest(cache: LatentCache, lengths: Array, seq: int, active: Array, config: ModelConfig) -> Reading:
    """The last `seq` of `lengths` positions."""
    positions = lengths[:, None] - seq + jnp.arange(seq)
    where = places(cache, positions, jnp.broadcast_to(active[:, None], positions.shape))
    turn = rotation(config.rope, rope_dim(config.attention), jnp.maximum(positions, 0))
    seen = jnp.where(active, lengths, 0)  # A sequence at rest costs nothing.
    return Reading(replace(cache, layers=()), turn, where, seen)


def decode(
    weights: Weights,
    cache: LatentCache,
    tokens: Int[Array, "batch seq"],
    active: Array,
    config: ModelConfig,
) -> tuple[Float[Array, "batch seq d"], Float[Array, "batch seq vocab"], LatentCache]:
    """Reads the next `seq` tokens of every sequence in the absorbed form.

    Sequences that are not `active` write nothing. `cache.lengths` is left for the caller to advance, by the
    tokens that are kept. Returns the hidden states after the final norm, the logits in float32 and the cache.
    """
    batch, seq = tokens.shape
    reading = _newest(cache, cache.lengths + seq, seq, active, config)
    rows = rows_of(batch, seq, config, weights.embedding.dtype)
    x = as_rows(weights.embedding[tokens], rows)
    reading = reading._replace(turn=jax.tree.map(lambda part: as_rows(part, rows), reading.turn))
    hidden, layers = _main(weights, x, cache, reading, config, None, rows)
    logits = linear(hidden, weights.head, rows, wide=True)
    hidden, logits = (x[: rows and rows.real].reshape(batch, seq, -1) for x in (hidden, logits))
    return hidden, logits, replace(cache, layers=(*layers, *cache.layers[config.n_layers :]))


def draft(
    weights: Weights,
    cache: LatentCache,
    depth: int,
    state: Float[Array, "batch window d"],
    tokens: Int[Array, "batch window"],
    active: Array,
    config: ModelConfig,
) -> tuple[Float[Array, "batch window d"], LatentCache]:
    """MTP depth `depth` over the last `window` positions of every sequence (DeepSeek-V3 eqs 21-22).

    `state` is the output of the depth before (of the model itself, at depth 1), and `tokens` those `depth`
    positions later. Returns the depth's output after its norm, and the cache with its entries written again:
    what an earlier step wrote with a rejected draft is mended, since the window covers it.
    """
    w, number = weights.depths[depth - 1], config.n_layers + depth - 1
    reading = _newest(cache, cache.lengths, state.shape[1], active, config)
    merged = _merge(w, state, weights.embedding[tokens], config)
    out, layer = _block(w["block"], merged, cache.layers[number], reading, config, None)
    layers = (*cache.layers[:number], layer, *cache.layers[number + 1 :])
    return rms_norm(out, w["norm"], config.norm_eps), replace(cache, layers=layers)

"""Prompts into the cache: chunk by chunk, in a few shapes."""

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation import forward
from dsv3_jax.generation.cache import LatentCache
from dsv3_jax.generation.programs import MANY_ROWS, Program
from dsv3_jax.generation.speculation import window
from dsv3_jax.generation.weights import Weights, kernels_for

SMALLEST_CHUNK = 16


def _prefill_chunk(
    weights: Weights,
    cache: LatentCache,
    kept: Float[Array, "batch window d"],
    tokens: Int[Array, "batch chunk_ahead"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
    config: ModelConfig,
    block: int,
    drafts: int,
) -> tuple[LatentCache, Float[Array, "batch window d"]]:
    """`forward.prefill`, keeping of its hidden states those of each prompt's last `window` positions."""
    hidden, cache = forward.prefill(
        weights, cache, tokens, start, lengths, config, block=block, drafts=drafts
    )
    wanted = lengths[:, None] - kept.shape[1] + jnp.arange(kept.shape[1]) - start
    here = (wanted >= 0) & (wanted < hidden.shape[1])
    index = jnp.clip(wanted, 0, hidden.shape[1] - 1)
    found = jnp.take_along_axis(hidden, index[..., None], axis=1)
    return cache, jnp.where(here[..., None], found, kept)


prefill_chunk = Program(_prefill_chunk, MANY_ROWS, static=("block", "drafts"), donate="cache")


def chunks(longest: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(start, size) of a prompt's chunks: whole ones, then the least power of two that holds the rest."""
    for start in range(0, longest, chunk):
        rest, size = longest - start, SMALLEST_CHUNK
        while size < min(rest, chunk):
            size *= 2
        yield start, min(size, chunk)


def prefill(
    weights: Weights,
    cache: LatentCache,
    prompts: Int[np.ndarray, "batch longest"],
    lengths: Int[np.ndarray, " batch"],
    config: ModelConfig,
    *,
    chunk: int,
    drafts: int,
) -> tuple[LatentCache, Float[Array, "batch window d"]]:
    """Reads whole prompts, padded at the right, chunk by chunk; `cache.lengths` are theirs afterwards."""
    batch, longest = prompts.shape
    kept = jnp.zeros((batch, max(1, window(drafts)), config.d_model), weights.embedding.dtype)
    for start, size in chunks(longest, chunk):
        piece = np.zeros((batch, size + drafts), np.int32)
        ahead = prompts[:, start : start + size + drafts]
        piece[:, : ahead.shape[1]] = ahead
        with kernels_for(weights):
            cache, kept = prefill_chunk.of(config)(
                weights, cache, kept, piece, np.int32(start), lengths, config, chunk, drafts
            )
    return replace(cache, lengths=jnp.asarray(lengths)), kept

"""Text from a model in training: a look at what it has learned, on the training path itself.

Every new token runs the whole window again; generation with a cache is for inference.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.data import Tokenizer
from dsv3_jax.model import Transformer, forward


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _fill(model: Transformer, variables: Any, window: jax.Array, start: jax.Array, rng, temperature: float):
    """Samples window[start:], left to right."""

    def one(i, window):
        outputs = forward(model, variables, window[None])
        logits = outputs.hidden[0, i - 1].astype(jnp.float32) @ outputs.head.astype(jnp.float32)
        token = jax.random.categorical(jax.random.fold_in(rng, i), logits / temperature)
        return window.at[i].set(token.astype(window.dtype))

    return lax.fori_loop(start, window.shape[0], one, window)


def sample_text(
    model: Transformer,
    variables: Any,
    tokenizer: Tokenizer,
    prompt: str,
    n_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 0.6,
) -> str:
    """The prompt and `n_tokens` tokens sampled after it, fewer where the text ends or the context is full.

    Args:
      model: the model.
      variables: its parameters and router state.
      tokenizer: of the training data.
      prompt: text to continue; an empty one continues the end of a document.
      n_tokens: tokens to sample.
      seed: of the samples.
      temperature: divides the logits.
    """
    given = tokenizer.encode(prompt) if prompt else np.array([tokenizer.eos_id], np.int32)
    given = given[-(model.config.max_seq_len - 1) :]
    length = min(model.config.max_seq_len, len(given) + n_tokens)
    window = np.zeros(length, np.int32)
    window[: len(given)] = given
    key = jax.random.key(seed)
    filled = np.asarray(_fill(model, variables, window, np.int32(len(given)), key, temperature))
    ends = np.flatnonzero(filled[len(given) :] == tokenizer.eos_id)
    stop = len(given) + int(ends[0]) if ends.size else length
    return prompt + tokenizer.decode(filled[len(given) : stop])

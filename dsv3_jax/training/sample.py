"""Text from a model in training: a look at what it has learned, by the generator that serves it."""

from typing import Any

import jax
from flax.core import meta

from dsv3_jax.data import Tokenizer
from dsv3_jax.generation import Generator, SamplingParams
from dsv3_jax.model import Transformer


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
    variables = meta.unbox(dict(variables))
    # One device is enough, and its kernels need no partitioning. Arrays of other hosts stay where they are.
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(variables)):
        variables = jax.device_put(variables, jax.local_devices()[0])
    generator = Generator(model.config, variables, tokenizer, dtype=model.dtype)
    given = tokenizer.encode(prompt)[-(model.config.max_seq_len - 1) :] if prompt else [tokenizer.eos_id]
    params = SamplingParams(max_new_tokens=n_tokens, temperature=temperature, seed=seed)
    return prompt + generator.generate([given], params)[0].text

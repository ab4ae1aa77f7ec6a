"""What a request may ask of a model, and what it asks of the sampler."""

from collections.abc import Sequence

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.generation.sampling import RequestError, SamplingParams


def check_prompt(prompt: Sequence[int] | np.ndarray, config: ModelConfig) -> np.ndarray:
    """The prompt as int32, or a RequestError that names the limit."""
    tokens = np.asarray(prompt, np.int64).reshape(-1)
    if not len(tokens):
        raise RequestError("the prompt is empty: give at least one token")
    if len(tokens) >= config.max_seq_len:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens, and model.max_seq_len is {config.max_seq_len}: "
            f"give at most {config.max_seq_len - 1}"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise RequestError(
            f"the prompt has token {int(tokens.max() if tokens.min() >= 0 else tokens.min())}, and "
            f"model.vocab_size is {config.vocab_size}: is this the tokenizer of the model?"
        )
    return tokens.astype(np.int32)


def check_drafts(config: ModelConfig, drafts: int) -> None:
    """Raises RequestError unless the model has so many depths to draft with."""
    if not 0 <= drafts <= config.mtp.depth:
        raise RequestError(f"speculation with {drafts} drafts, but model.mtp.depth is {config.mtp.depth}")


def check_finite(finite: np.ndarray) -> None:
    """Raises RequestError for the rows of a batch whose logits hold NaN or infinity."""
    if not finite.all():
        rows = np.flatnonzero(~finite).tolist()
        raise RequestError(
            f"the model's logits are not finite (prompts {rows}): its weights or its cache hold NaN or "
            "infinity; try --dtype fp32, or another checkpoint"
        )


def needs_filters(params: SamplingParams) -> bool:
    """Whether a request uses more than the temperature."""
    plain = SamplingParams()
    fields = ("top_k", "top_p", "min_p", "repetition_penalty")
    return any(getattr(params, name) != getattr(plain, name) for name in fields)

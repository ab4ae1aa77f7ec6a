"""Generation at the latent cache's price: prefill, absorbed decoding, sampling, speculation.

weights, cache       parameters arranged for decoding; what is kept of the tokens read
linear, attention, experts   the parts of a layer over a cache
forward              prefill, decode and draft: pure functions over weights and cache
sampling             from logits to tokens
speculation, decode  drafts and their verification; the state and the step
prefill              prompts into the cache, chunk by chunk
text, results, generator      tokens to text; `Generator`, the Python interface
requests, slots, engine   continuous batching: what is asked, the device's part, the host's
kernel_check         a check of the kernels before the first request
folders              from a folder to a model with its tokenizer
"""

from dsv3_jax.generation.generator import Generator
from dsv3_jax.generation.results import Completion
from dsv3_jax.generation.sampling import RequestError, SamplingParams
from dsv3_jax.generation.text import Piece, TextStream

__all__ = ["Completion", "Generator", "Piece", "RequestError", "SamplingParams", "TextStream"]

"""From text to batches: sources -> tokenizer -> cached corpus -> packed sequences -> loader.

In reading order: `sources` and `stdlib_builder` (documents), `tokenizers`, `corpus` (tokenised once, in
`cache`), `packing` (the order of everything, and fill-in-the-middle), `loader` (batches for a process).
Nothing here computes on a device.
"""

from dsv3_jax.data.bigram import bigram_cross_entropy
from dsv3_jax.data.checks import check
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.loader import Loader
from dsv3_jax.data.tokenizers import Tokenizer, load_tokenizer

__all__ = ["DataError", "Loader", "Tokenizer", "bigram_cross_entropy", "check", "load_tokenizer"]

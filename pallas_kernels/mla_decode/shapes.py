"""Named shapes of `mla_decode`, shared by tests and benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. `lengths` are those of all sequences, or of each (`capacity` holds the longest).

    `page` is the page size of a paged cache (0: contiguous), `cache` its dtype.
    """

    batch: int
    lengths: int | tuple[int, ...]
    heads: int
    s_q: int = 1
    page: int = 0
    rank: int = 512
    rope: int = 64
    cache: str = "bfloat16"

    def __str__(self):
        lengths = (
            self.lengths if isinstance(self.lengths, int) else f"{min(self.lengths)}-{max(self.lengths)}"
        )
        name = f"B{self.batch} L{lengths} H{self.heads}"
        name += f" queries {self.s_q}" if self.s_q > 1 else ""
        name += f" page {self.page}" if self.page else ""
        name += f" {self.rank}/{self.rope}" if (self.rank, self.rope) != (512, 64) else ""
        return name + (f" {self.cache}" if self.quantised else "")

    @property
    def quantised(self) -> bool:
        return self.cache != "bfloat16"

    def all_lengths(self) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.lengths, np.int32), (self.batch,))

    def flops(self) -> float:
        """Operations over the entries that are valid, the diagonal of the new tokens counted whole."""
        return 2.0 * self.s_q * self.heads * int(self.all_lengths().sum()) * (2 * self.rank + self.rope)

    def bytes(self) -> float:
        """The cache's entries and their factors, once; queries and output in bf16."""
        width = (self.rank + self.rope) * jnp.dtype(self.cache).itemsize + (8 if self.quantised else 0)
        cache = int(self.all_lengths().sum()) * width
        return cache + 2 * self.batch * self.s_q * self.heads * (2 * self.rank + self.rope)

    def operands(self, seed: int = 0, factor: float = 1.0):
        """Random operands of `mla_decode` and its keyword arguments; logits scale with `factor`."""
        keys = jax.random.split(jax.random.key(seed), 3)
        lengths = self.all_lengths()
        capacity = -(-max(8, int(lengths.max())) // 8) * 8
        options: dict[str, Any] = {"scale": 192**-0.5}
        rows, slots = self.batch, capacity
        if self.page:
            pages = -(-capacity // self.page)
            rows, slots = self.batch * pages, self.page
            table = np.random.default_rng(seed).permutation(rows).astype(np.int32).reshape(self.batch, pages)
            options["page_table"] = jnp.asarray(table)
        q = jax.random.normal(
            keys[0], (self.batch, self.s_q, self.heads, self.rank + self.rope), jnp.bfloat16
        )
        c_kv = jax.random.normal(keys[1], (rows, slots, self.rank), jnp.bfloat16)
        k_rope = jax.random.normal(keys[2], (rows, slots, self.rope), jnp.bfloat16)
        if self.quantised:
            c_kv, options["c_kv_scale"] = quantise(c_kv, self.cache)
            k_rope, options["k_rope_scale"] = quantise(k_rope, self.cache)
        return (q * factor, c_kv, k_rope, jnp.asarray(lengths)), options


def quantise(x, dtype):
    """Codes, and the float32 factor of each vector: its largest number over the dtype's."""
    x, integer = x.astype(jnp.float32), jnp.issubdtype(dtype, jnp.integer)
    limit = jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max
    factor = jnp.max(jnp.abs(x), -1) / float(limit)
    x = x / factor[..., None]
    return (jnp.round(x) if integer else x).astype(dtype), factor


_RAGGED = np.random.default_rng(0)
# The decoding shapes that the issue of speed is decided on, and lengths that differ much.
BENCHMARK = (
    Shape(32, 4096, 16),
    Shape(128, 4096, 16),
    Shape(32, 16384, 16),
    Shape(128, 16384, 16),
    Shape(128, 4096, 128),
    Shape(1, 16384, 16),
    Shape(1, 16384, 128),
    Shape(1, 131072, 16),
    Shape(128, 4096, 16, s_q=2),
    Shape(128, 4096, 16, page=64),
    *(Shape(batch, tuple(map(int, _RAGGED.integers(100, 8192, batch))), 16) for batch in (32, 128)),
    *(
        Shape(*lengths, heads, page=page, cache=cache)
        for cache in ("float8_e4m3fn", "int8")
        for lengths, heads, page in (
            ((128, 16384), 16, 0),
            ((128, 16384), 16, 64),
            ((128, 4096), 16, 0),
            ((32, 16384), 16, 0),
            ((32, 4096), 16, 0),
            ((128, 4096), 128, 0),
        )
    ),
)

# Where a kernel may go wrong: lengths off the block, nothing to see, few rows, several tiles of rows, pages.
CORRECTNESS = (
    Shape(1, 1, 16),
    Shape(3, (0, 129, 1000), 16),
    Shape(5, (128, 64, 1, 2000, 300), 128),
    Shape(4, (700, 1, 0, 513), 16, s_q=2),
    Shape(2, (5, 900), 40, s_q=3),
    Shape(3, (77, 1024, 640), 16, page=64),
    Shape(3, (1, 1500, 250), 24, s_q=2, page=16),
    Shape(2, (4000, 31), 16, s_q=8, page=128),
    Shape(300, 100, 8),
    Shape(2, (300, 511), 16, rank=256),
    *(
        Shape(*sizes, cache=cache, **more)
        for cache in ("float8_e4m3fn", "int8")
        for sizes, more in (
            ((1, 1, 16), {}),
            ((3, (0, 129, 1000), 16), {}),
            ((4, (700, 1, 0, 513), 16), {"s_q": 2}),
            ((2, (5, 900), 40), {"s_q": 3, "rank": 256}),
            ((3, (1, 1500, 250), 24), {"s_q": 2, "page": 32}),
            ((3, (77, 8000, 640), 128), {"page": 64}),
            ((200, 100, 8), {}),
        )
    ),
)

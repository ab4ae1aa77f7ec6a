"""Named shapes of `mla_attention`, shared by tests and benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths and widths of one call; `d_rope` of the `d_qk` columns of the key are shared by the heads.

    `documents` packs that many documents of random lengths into each row (0: no segment ids).
    """

    batch: int
    length: int
    heads: int
    kv_length: int | None = None
    kv_heads: int | None = None
    d_qk: int = 192
    d_v: int = 128
    d_rope: int = 0
    causal: bool = True
    documents: int = 0

    def __str__(self):
        name = f"B{self.batch} S{self.length} H{self.heads} {self.d_qk}/{self.d_v}"
        if self.kv_length not in (None, self.length):
            name += f" kv {self.kv_length}"
        if self.kv_heads not in (None, self.heads):
            name += f" kv heads {self.kv_heads}"
        name += f" rope {self.d_rope}" if self.d_rope else ""
        name += "" if self.causal else " full"
        return name + (f" {self.documents} documents" if self.documents else "")

    def flops(self) -> float:
        """Operations of the forward pass, counting half the square where causal; documents not considered."""
        kv_length = self.kv_length or self.length
        pairs = self.length * (kv_length - self.length / 2) if self.causal else self.length * kv_length
        return 2.0 * self.batch * self.heads * pairs * (self.d_qk + self.d_v)

    def backward_flops(self) -> float:
        """Operations of the backward pass: three products of width d_qk, two of width d_v."""
        return self.flops() * (3 * self.d_qk + 2 * self.d_v) / (self.d_qk + self.d_v)

    def operands(self, seed: int = 0, factor: float = 1.0):
        """Random bf16 `(q, k, v)` and keyword arguments of `mla_attention`; logits scale with `factor`."""
        kv_length, kv_heads = self.kv_length or self.length, self.kv_heads or self.heads
        keys = jax.random.split(jax.random.key(seed), 4)

        def normal(key, *shape):
            return jax.random.normal(key, shape, jnp.bfloat16)

        q = normal(keys[0], self.batch, self.length, self.heads, self.d_qk) * factor
        k = normal(keys[1], self.batch, kv_length, kv_heads, self.d_qk - self.d_rope)
        v = normal(keys[2], self.batch, kv_length, kv_heads, self.d_v)
        options: dict[str, Any] = {"causal": self.causal}
        if self.d_rope:
            options["k_rope"] = normal(keys[3], self.batch, kv_length, self.d_rope)
        if self.documents:
            longest = max(self.length, kv_length)
            rng = np.random.default_rng(seed)
            starts = rng.integers(0, longest, (self.batch, self.documents - 1, 1))
            ids = (np.arange(longest) >= starts).sum(1).astype(np.int32)
            options["segment_ids"] = jnp.asarray(ids[:, longest - self.length :])
            options["kv_segment_ids"] = jnp.asarray(ids[:, longest - kv_length :])
        return (q, k, v), options


# The training shapes that the issue of speed is decided on.
BENCHMARK = (
    Shape(1, 4096, 64),
    Shape(1, 8192, 64),
    Shape(1, 16384, 64),
    Shape(1, 4096, 128),
    Shape(1, 8192, 128),
    Shape(1, 16384, 128),
    Shape(8, 4096, 16),
)

# Where a kernel may go wrong: lengths off the tile, one token, rows that see nothing, packing, large logits.
CORRECTNESS = (
    Shape(1, 1, 2),
    Shape(2, 128, 2),
    Shape(1, 1000, 3, d_rope=64),
    Shape(2, 777, 2),
    Shape(1, 1024, 4, kv_heads=2, d_qk=128),
    Shape(1, 515, 2, d_qk=64, d_v=64),
    Shape(1, 300, 2, kv_length=1111),
    Shape(1, 1111, 2, kv_length=300, d_rope=64),
    Shape(1, 640, 2, kv_length=333, causal=False),
    Shape(2, 1500, 2, d_rope=64, documents=5),
    Shape(3, 513, 2, documents=9),
    Shape(1, 700, 2, documents=4, causal=False),
    Shape(1, 2048, 2, d_rope=64, documents=40),
)

"""What a model is made of: parameters by part, total and active for a token, and the cache of a token.

Everything follows from the shapes of the model's variables; nothing is allocated.
"""

import math
from typing import NamedTuple

from dsv3_jax.config import ModelConfig
from dsv3_jax.convert.shapes import Path, shapes

PARTS: tuple[str, ...] = (
    "embedding",
    "attention",
    "dense FFN",
    "shared experts",
    "routed experts",
    "router",
    "norms",
    "head",
)


class Count(NamedTuple):
    """Parameters, and those that one token uses."""

    total: int
    active: int

    def __add__(self, other: "Count") -> "Count":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Count(self.total + other.total, self.active + other.active)


def count_parameters(config: ModelConfig) -> tuple[dict[str, Count], dict[str, Count]]:
    """(main model, prediction layers), by part; the router bias is not a parameter.

    Active are all parameters but those of the routed experts that a token does not reach. The embedding
    and the head count as active whole, as DeepSeek publishes it; a prediction layer shares both.
    """
    main = dict.fromkeys(PARTS, Count(0, 0))
    extra: dict[str, Count] = {}
    for path, shape in shapes(config).items():
        if path[0] != "params":
            continue
        part, size = _part(path), math.prod(shape)
        reached = config.moe.top_k / config.moe.n_experts if part == "routed experts" else 1
        count = Count(size, round(size * reached))
        where = extra if path[1].startswith("mtp_") else main
        where[part] = where.get(part, Count(0, 0)) + count
    return {part: count for part, count in main.items() if count.total}, extra


def total(counts: dict[str, Count]) -> Count:
    """The sum over the parts."""
    return sum(counts.values(), Count(0, 0))


def _part(path: Path) -> str:
    names = set(path)
    if path[-1] == "scale":
        return "norms"
    if path[-1] == "merge":
        return "merge"
    if "attention" in names:
        return "attention"
    if "ffn" in names:
        return "dense FFN"
    if "shared" in names:
        return "shared experts"
    if "moe" in names:
        return "router" if path[-1] == "centroids" else "routed experts"
    return path[-1]


def cache_elements(config: ModelConfig) -> int:
    """Elements that generation caches of a token, over all layers (DeepSeek-V2 table 1)."""
    a = config.attention
    if a.kind == "mla":
        return config.n_layers * (a.kv_lora_rank + a.qk_rope_head_dim)
    kv_heads = {"mha": a.n_heads, "gqa": a.n_kv_heads, "mqa": 1}[a.kind]
    return config.n_layers * 2 * kv_heads * a.head_dim

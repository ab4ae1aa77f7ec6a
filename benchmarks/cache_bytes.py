"""Bytes that a token adds to the cache: by the formulas, and in the arrays themselves, for every preset.

    python -m benchmarks.cache_bytes

Elements a token and layer: MHA 2 n_h d_h, GQA 2 n_g d_h, MQA 2 d_h, MLA kv_lora_rank + qk_rope (DeepSeek-V2
table 1). DeepSeek-V2 reports 93.3% less cache than DeepSeek 67B: V2's in about 6 bits an element (§3.2.3)
against 67B's in 16. The last lines compute it, and what our dtypes give with their scales counted.
"""

import importlib.util
from pathlib import Path

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.config_checks import typed
from dsv3_jax.generation.cache import DTYPES, LayerCache, bytes_per_token, init_cache

CAPACITY = 64
SHOWN = ("bf16", "fp8", "int8")


def formula(config: ModelConfig) -> int:
    """Elements a token over all layers, from the paper's table and from nothing of the code measured."""
    a = config.attention
    if a.kind == "mla":
        return config.n_layers * (a.kv_lora_rank + a.qk_rope_head_dim)
    heads = {"mha": a.n_heads, "gqa": a.n_kv_heads, "mqa": 1}[a.kind]
    return config.n_layers * 2 * heads * a.head_dim


def allocated(config: ModelConfig, dtype: str) -> int:
    """Bytes a token of the arrays that generation allocates (shapes only: nothing is)."""
    cache = jax.eval_shape(lambda: init_cache(config, 1, CAPACITY, dtype))
    layers: tuple[LayerCache, ...] = cache.layers
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers)) // CAPACITY


def presets() -> dict[str, ModelConfig]:
    """The models of `configs/`."""
    found = {}
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = typed(module.get_config()).model
    return found


def main() -> None:
    models = presets()
    assert set(SHOWN) <= set(DTYPES)
    print(f"{'preset':<16}{'attention':>10}{'layers':>8}{'elements':>10}{'formula bf16':>14}", end="")
    print("".join(f"{dtype:>10}" for dtype in SHOWN) + "   bytes a token in the arrays")
    for name, config in models.items():
        elements = formula(config)
        print(
            f"{name:<16}{config.attention.kind:>10}{config.n_layers:>8}{elements:>10,}{2 * elements:>14,}",
            end="",
        )
        print("".join(f"{allocated(config, dtype):>10,}" for dtype in SHOWN))
        assert allocated(config, "bf16") == 2 * elements == bytes_per_token(config, "bf16")
    if {"v2_236b", "llm_67b"} <= set(models):
        base = 2 * formula(models["llm_67b"])
        v2 = models["v2_236b"]
        print(f"\nDeepSeek-V2 against DeepSeek 67B in bf16 ({base:,} bytes a token):")
        print(f"  in the paper's 6 bits: {1 - formula(v2) * 6 / 8 / base:.1%} less (paper: 93.3%)")
        for dtype in SHOWN:
            print(f"  in {dtype}, with scales: {1 - allocated(v2, dtype) / base:.1%} less")


if __name__ == "__main__":
    main()

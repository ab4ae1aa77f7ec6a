"""DeepSeek-V3 in JAX: the model, its training, inference and conversion."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_jax.pretrained import forward, load_pretrained, save_pretrained

__all__ = ["forward", "load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Imports JAX when a name is first used, so that the command line answers quickly."""
    if name in __all__:
        from dsv3_jax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The model: pure functions over arrays, and thin Flax Linen modules that declare their parameters."""

from dsv3_jax.model.transformer import Outputs, Transformer, forward, init_variables

__all__ = ["Outputs", "Transformer", "forward", "init_variables"]

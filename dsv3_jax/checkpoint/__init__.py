"""Checkpoints: saved asynchronously, verified when read, resumed from the newest that is sound."""

from dsv3_jax.checkpoint.manager import CheckpointError, Checkpoints, Restored

__all__ = ["CheckpointError", "Checkpoints", "Restored"]

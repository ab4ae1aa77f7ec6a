"""The FP8 recipe of DeepSeek-V3: which operand is quantised how, in which product."""

from dsv3_jax.precision.ffn import ffn
from dsv3_jax.precision.fp8 import linear

__all__ = ["ffn", "linear"]

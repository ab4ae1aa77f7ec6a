"""Accelerator kernels for DeepSeek-V3, usable without `dsv3_jax`.

One folder an operation. Each holds the public op (`__init__.py`: contract, checks, the
`implementation=` switch), `reference.py` (plain `jax.numpy`; it defines the meaning) and the kernels
(`mosaic_gpu.py` for Hopper, `mosaic_tpu.py` for TPU, `blocked.py` where plain JAX can be made fast).
"""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import (
    UnsupportedError,
    target_platform,
)
from pallas_kernels.mla_attention import mla_attention

__all__ = ["UnsupportedError", "grouped_matmul", "mla_attention", "target_platform"]

"""Accelerator kernels for DeepSeek-V3, usable without `dsv3_jax`.

One folder an operation. Each holds the public op (`__init__.py`: contract, checks, the
`implementation=` switch), `reference.py` (plain `jax.numpy`; it defines the meaning) and the kernels
(`mosaic_gpu.py` for Hopper, `mosaic_tpu.py` for TPU, `blocked.py` where plain JAX can be made fast).
"""

from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_quantize import (
    PackedE5M6,
    Quantized,
    dequantize,
    pack_rows_e5m6,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    unpack_rows_e5m6,
)
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import (
    UnsupportedError,
    target_platform,
)
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode

__all__ = [
    "PackedE5M6",
    "Quantized",
    "UnsupportedError",
    "dequantize",
    "fp8_grouped_matmul",
    "fp8_grouped_wgrad",
    "fp8_matmul",
    "grouped_matmul",
    "mla_attention",
    "mla_decode",
    "pack_rows_e5m6",
    "quantize_blocks",
    "quantize_columns",
    "quantize_rows",
    "unpack_rows_e5m6",
    "target_platform",
]

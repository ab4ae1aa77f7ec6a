"""What torch is timed with quantises as ours does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.quantize_torch import PEERS  # noqa: E402
from pallas_kernels.fp8_quantize import (  # noqa: E402
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)

X = np.random.default_rng(0).standard_normal((256, 512), np.float32)
OURS = {
    "rows": quantize_rows,
    "rows, power of two": lambda x: quantize_rows(x, power_of_two=True),
    "rows of swiglu": lambda x: quantize_rows(x, swiglu=True),
    "columns": quantize_columns,
    "columns of quantised rows": lambda x: quantize_columns(quantize_rows(x)),
    "weight blocks": quantize_blocks,
    "weight blocks, transposed": lambda x: quantize_blocks(x, transpose=True),
}


@pytest.mark.parametrize("name", PEERS)
def test_torch_quantises_alike(name):
    want = jax.jit(OURS[name])(X)
    operands = PEERS["rows"](torch.tensor(X)) if name == "columns of quantised rows" else [torch.tensor(X)]
    values, scales = PEERS[name](*operands)
    codes = jnp.asarray(values.view(torch.uint8).numpy())
    got = Quantized(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), jnp.asarray(scales.numpy()))
    assert got.values.shape == want.values.shape
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)
    # A number at the middle of two codes may go either way: a step of 2^-3, of few.
    np.testing.assert_allclose(dequantize(got), dequantize(want), rtol=0.13, atol=1e-3)
    assert np.mean(dequantize(got) == dequantize(want)) > 0.999 or name == "rows of swiglu"

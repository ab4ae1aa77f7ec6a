"""`fp8_matmul` and the grouped FP8 products against float64 numpy, and the lowering of their GPU kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, target_platform
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad
from pallas_kernels.fp8_grouped_matmul.mosaic_gpu import Tiling
from pallas_kernels.fp8_grouped_matmul.mosaic_gpu_wgrad import OVERLAPPED, tiling_for
from pallas_kernels.fp8_matmul import fp8_matmul, mosaic_gpu
from pallas_kernels.fp8_quantize import (
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)
from tests.oracles import fp8

needs_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need JAX 0.11.2"
)
SIZES = (5, 0, 17, 1, 130, 0)
PAST = 6

# Compiled whole: op by op they take many times longer to compile.
_rows, _columns, _blocks = jax.jit(quantize_rows), jax.jit(quantize_columns), jax.jit(quantize_blocks)
_dequantized, _product = jax.jit(dequantize), jax.jit(fp8_matmul, static_argnames="out_dtype")


@functools.partial(jax.jit, static_argnames=("power_of_two", "how"))
def _every_product(x, dout, w, sizes, power_of_two, how):
    """A product of each kind, of operands quantised the same way."""
    options = dict(power_of_two=power_of_two)
    a, w8 = quantize_rows(x, **options), quantize_blocks(w, **options)
    left, right = (quantize_columns(y, sizes, **options) for y in (x, dout))
    one = Quantized(w8.values[1], w8.scales[1])
    return (
        fp8_matmul(a, one, out_dtype=jnp.float32, implementation=how),
        fp8_grouped_matmul(a, w8, sizes, out_dtype=jnp.float32, implementation=how),
        fp8_grouped_wgrad(left, right, sizes, implementation=how),
    )


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _float64(x: Quantized):
    return np.asarray(_dequantized(x), np.float64)


def _close(got, left, right):
    """Float32 sums: 2e-6 of |row| |column|, some thirty units in the last place."""
    scale = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    assert np.all(np.abs(np.asarray(got, np.float64) - left @ right.T) <= 2e-6 * scale)


@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(32, 136, 256), (7, 20, 130), (1, 1, 1)])
def test_products_of_the_dequantised_operands(m, n, k, wgrad):
    a, b = _rows(_normal(m, k)), (_rows if wgrad else _blocks)(_normal(n, k, seed=1))
    out = _product(a, b, out_dtype=jnp.float32)
    _close(out, _float64(a), _float64(b))
    rounded = _product(a, b)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, out.astype(jnp.bfloat16))
    before = jnp.round(100 * _normal(m, n, seed=2))
    added = _product(a, b, out_dtype=jnp.float32, accumulate=before)
    np.testing.assert_array_equal(added, np.asarray(out) + np.asarray(before))  # One float32 addition.


@pytest.mark.parametrize("power_of_two", [True, False])
def test_storage_only(power_of_two):
    """Dequantised to bfloat16: exact with power-of-two scales, 2^-9 an operand otherwise."""
    rows, sizes = sum(SIZES) + PAST, jnp.asarray(SIZES, jnp.int32)
    x, dout, w = _normal(rows, 200), _normal(rows, 40, seed=1), _normal(len(SIZES), 40, 200, seed=2)
    found = (_every_product(x, dout, w, sizes, power_of_two, how) for how in ("bf16", "reference"))
    for got, want in zip(*found, strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 1e-6 if power_of_two else 1e-4 < error < 2**-8


def test_quantisation_error_is_that_of_e4m3():
    a, b = _normal(64, 512), _normal(64, 512, seed=1)
    out = _product(_rows(a), _blocks(b), out_dtype=jnp.float32)
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    # Three bits of mantissa: 2^-4 / sqrt(3) at most, about 0.026 an operand on normal numbers.
    assert 0.02 < np.linalg.norm(out - want) / np.linalg.norm(want) < 0.05


def test_the_model_of_the_tensor_cores_has_their_measured_error():
    """The oracle of the GPU tests: 1.3e-4 in the norm, as on an H200, and what falls off beside 448^2."""
    a, b = (_rows(_normal(32, 1024, seed=seed)) for seed in (0, 1))
    want, got = _float64(a) @ _float64(b).T, 0
    for step in range(8):
        at = slice(128 * step, 128 * step + 128)
        scale = np.asarray(a.scales[step], np.float64)[:, None] * np.asarray(b.scales[step], np.float64)
        got += fp8.tensor_cores(a.values[:, at], b.values[:, at]) * scale
    assert 1.2e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 1.4e-4
    ones = np.ones((1, 128))
    assert fp8.tensor_cores(ones, ones) == 128
    ones[0, 0] = 448
    assert fp8.tensor_cores(ones, ones) == 448**2


def test_grouped():
    rows = sum(SIZES) + PAST
    x, w = _rows(_normal(rows, 200)), _blocks(_normal(len(SIZES), 40, 200, seed=1))
    out = jax.jit(fp8_grouped_matmul, static_argnames="out_dtype")(
        x, w, jnp.asarray(SIZES, jnp.int32), out_dtype=jnp.float32
    )
    x64, w64, start = _float64(x), _float64(w), 0
    for g, size in enumerate(SIZES):
        _close(out[start : start + size], x64[start : start + size], w64[g])
        start += size
    assert np.all(np.asarray(out)[start:] == 0)


def test_grouped_wgrad():
    rows, sizes = sum(SIZES) + PAST, jnp.asarray(SIZES, jnp.int32)
    x, dout = _normal(rows, 24), _normal(rows, 40, seed=1)
    qx, qd = _columns(x, sizes), _columns(dout, sizes)
    out = jax.jit(fp8_grouped_wgrad)(qx, qd, sizes)
    assert out.dtype == jnp.float32 and out.shape == (len(SIZES), 24, 40)
    x64, d64, at, start = _float64(qx), _float64(qd), 0, 0
    for g, size in enumerate(SIZES):
        room = -(-size // 128) * 128
        _close(out[g], x64[:, at : at + room], d64[:, at : at + room])
        exact = np.asarray(x)[start : start + size].T @ np.asarray(dout)[start : start + size]
        # Against the unquantised: E4M3 loses 0.026 an operand, so the groups' rows are the right ones.
        norms = np.linalg.norm(np.asarray(x)[start : start + size]) * np.linalg.norm(
            np.asarray(dout)[start : start + size]
        )
        assert np.linalg.norm(np.asarray(out[g]) - exact) <= 0.06 * norms
        at, start = at + room, start + size
    before = _normal(*out.shape, seed=2)
    added = jax.jit(fp8_grouped_wgrad)(qx, qd, sizes, accumulate=before)
    np.testing.assert_array_equal(added, np.asarray(out) + np.asarray(before))
    with pytest.raises(ValueError, match="accumulate"):
        fp8_grouped_wgrad(qx, qd, sizes, accumulate=before[:, :8])


def test_bad_calls_are_refused_with_the_reason():
    a, b = _rows(_normal(8, 256)), _blocks(_normal(16, 256))
    with pytest.raises(ValueError, match="k differs"):
        fp8_matmul(a, _blocks(_normal(16, 128)))
    with pytest.raises(ValueError, match="lhs scales"):
        fp8_matmul(Quantized(a.values, a.scales.T), b)
    with pytest.raises(ValueError, match="128x128 blocks"):
        fp8_matmul(a, Quantized(b.values, b.scales.T))
    with pytest.raises(ValueError, match="accumulate"):
        fp8_matmul(a, b, accumulate=jnp.zeros((16, 8)))
    with pytest.raises(ValueError, match="do not contract"):
        fp8_grouped_matmul(a, b, jnp.asarray([8]))
    with pytest.raises(ValueError, match="a multiple of 128"):
        fp8_grouped_wgrad(_rows(_normal(8, 100)), _rows(_normal(8, 100)), jnp.asarray([8]))
    if jax.default_backend() != "gpu":
        with pytest.raises(UnsupportedError, match="older than 0.11.2|not on cpu"):
            fp8_matmul(a, b, implementation="mosaic_gpu")


def _struct(shape, scales):
    kinds = (shape, jnp.float8_e4m3fn), (scales, jnp.float32)
    return Quantized(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))


@needs_mosaic_gpu
@pytest.mark.parametrize(("m", "n", "k"), [(512, 1408, 2048), (100, 40, 200)])
def test_gpu_kernels_lower(m, n, k):
    """Layouts and shared memory are checked on any machine, for whole and for ragged tiles."""
    steps, blocks = -(-k // 128), -(-n // 128)
    a, rows = _struct((m, k), (steps, m)), _struct((n, k), (steps, n))
    w, stack = _struct((n, k), (blocks, steps)), _struct((4, n, k), (4, blocks, steps))
    left, right = _struct((m, 640), (5, m)), _struct((n, 640), (5, n))

    def every(a, rows, w, stack, left, right, sizes):
        return (
            fp8_matmul(a, w),
            fp8_matmul(a, rows, out_dtype=jnp.float32),
            fp8_grouped_matmul(a, stack, sizes),
            fp8_grouped_wgrad(left, right, sizes),
            fp8_matmul(a, w, promote=False),
            fp8_matmul(a, rows, promote=False),
            fp8_grouped_matmul(a, stack, sizes, promote=False),
            fp8_grouped_wgrad(left, right, sizes, promote=False),
        )

    with target_platform("gpu"):
        traced = jax.jit(every).trace(a, rows, w, stack, left, right, jax.ShapeDtypeStruct((4,), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 8


@needs_mosaic_gpu
@pytest.mark.parametrize("kind", ["block", "row", "groups"])
def test_gpu_kernels_add_where_the_sum_lies(kind):
    """The kernel's result is the memory of its last operand: no second array, no pass of its own."""
    a, m, n = _struct((128, 640), (5, 128)), 128, 192
    b = _struct((n, 640), (2, 5) if kind == "block" else (5, n))
    total = jax.ShapeDtypeStruct((3, m, n) if kind == "groups" else (m, n), jnp.float32)

    def add(total, a, b, sizes):
        if kind == "groups":
            return fp8_grouped_wgrad(a, b, sizes, accumulate=total)
        return fp8_matmul(a, b, out_dtype=jnp.float32, accumulate=total)

    with target_platform("gpu"):
        traced = jax.jit(add, donate_argnums=0).trace(total, a, b, jax.ShapeDtypeStruct((3,), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    last = {"block": 6, "row": 5, "groups": 5}[kind]
    assert f"output_operand_alias<output_tuple_indices = [], operand_index = {last}" in call
    assert not any("stablehlo.add" in line and "192xf32" in line for line in text.splitlines())


@needs_mosaic_gpu
@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize(
    "options", [{"pair": True}, {"n": 192, "waves": 1}, {"waves": 1, "stages": 5, "buffers": 2, "overlap": 3}]
)
def test_every_kind_of_tiling_lowers(options, by_block):
    a, b = _struct((256, 896), (7, 256)), _struct((512, 896), (4, 7) if by_block else (7, 512))
    tiling = Tiling(**options)

    def product(a, b):
        return mosaic_gpu.matmul(a, b, out_dtype=jnp.dtype(jnp.bfloat16), tiling=tiling)

    with target_platform("gpu"):
        assert "mosaic_gpu" in jax.jit(product).trace(a, b).lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic_gpu
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_weight_gradients_take_wide_tiles_where_those_fill_the_last_round(out_dtype):
    # 132 multiprocessors. 2816 x 2048: 22 x 16 tiles of 128 columns are 3 rounds, 22 x 12 of 176 just 2.
    # 7168 x 2048: 7 rounds; 6, 6 and 5 of 160, 176 and 192. 128 x 176: one each.
    assert [tiling_for(*shape).n for shape in ((2816, 2048), (7168, 2048), (128, 176))] == [176, 128, 128]
    assert tiling_for(7168, 2048) == OVERLAPPED
    a, b = _struct((2816, 256), (2, 2816)), _struct((2048, 256), (2, 2048))
    with target_platform("gpu"):
        product = jax.jit(functools.partial(mosaic_gpu.matmul, out_dtype=jnp.dtype(out_dtype)))
        text = product.trace(a, b).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_overlap_takes_one_wave():
    with pytest.raises(ValueError, match="overlap takes one wave"):
        Tiling(waves=2, overlap=2)

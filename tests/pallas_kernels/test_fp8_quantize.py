"""FP8 quantisation against what it promises, in float64 numpy, and the lowering of its GPU kernels."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, target_platform
from pallas_kernels.fp8_quantize import (
    Quantized,
    dequantize,
    pack_e5m6,
    pack_rows_e5m6,
    padded_rows,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    unpack_e5m6,
    unpack_rows_e5m6,
)

needs_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need JAX 0.11.2"
)
ON_GPU = jax.default_backend() == "gpu"

# Compiled whole: op by op they take many times longer to compile.
_OPTIONS = ("power_of_two", "dtype", "swiglu")
_rows = jax.jit(quantize_rows, static_argnames=_OPTIONS)
_columns = jax.jit(quantize_columns)
_blocks = jax.jit(quantize_blocks)
_dequantized = jax.jit(dequantize)
_there_and_back = jax.jit(lambda x: unpack_e5m6(pack_e5m6(x), jnp.float32))


@jax.jit
def _packed_and_back(x):
    packed = pack_rows_e5m6(x)
    return packed, unpack_rows_e5m6(packed, jnp.float32), unpack_rows_e5m6(packed)


def _operand(rows, k, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal((rows, k)) * 3
    x[1 % rows, : k // 2] *= 1e4  # An outlier tile, and tiny ones.
    x[2 % rows] *= 1e-6
    return jnp.asarray(x, dtype)


def _tiles(x, size=128):
    """Largest magnitude of each 1x128 tile, spread over the tile again."""
    x = np.abs(np.asarray(x, np.float64))
    top = [x[:, i : i + size].max(1, keepdims=True) for i in range(0, x.shape[1], size)]
    return np.concatenate([np.repeat(t, size, 1) for t in top], 1)[:, : x.shape[1]]


def _check_rounding(quantised, x, top, dtype=jnp.float8_e4m3fn):
    """Every number within half a step of its FP8 dtype, at the scale that the tile's maximum asks for."""
    info = ml_dtypes.finfo(dtype)
    scale, x = top / float(info.max), np.asarray(x, np.float64)
    half_step = np.maximum(np.abs(x) * 2.0 ** -(info.nmant + 1), scale * float(info.smallest_subnormal) / 2)
    # Beside the half step: float32 rounds the inverse, the product and the scale, 2^-24 each.
    error = np.abs(np.asarray(_dequantized(quantised), np.float64) - x)
    assert np.all(error <= half_step * (1 + 1e-6) + 4 * 2.0**-24 * np.abs(x))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize(("rows", "k"), [(5, 256), (7, 200), (1, 3)])
def test_rows(rows, k, dtype):
    x = _operand(rows, k)
    quantised = _rows(x, dtype=dtype)
    assert quantised.values.dtype == dtype and quantised.scales.shape == (-(-k // 128), rows)
    _check_rounding(quantised, x, _tiles(x), dtype)


@pytest.mark.parametrize("k", [256, 100])
def test_power_of_two_scales(k):
    x = _operand(6, k)
    quantised = _rows(x, power_of_two=True)
    mantissa, _ = np.frexp(np.asarray(quantised.scales))
    assert np.all(mantissa == 0.5)
    needed = _tiles(x)[:, ::128].T / 448
    assert np.all((np.asarray(quantised.scales) >= needed) & (np.asarray(quantised.scales) < 2 * needed))
    _check_rounding(quantised, x, 2 * _tiles(x))
    exact = 2.0 ** np.arange(-4, 4)[None, :] * np.ones((2, 1))  # Powers of two survive.
    np.testing.assert_array_equal(_dequantized(_rows(jnp.asarray(exact), power_of_two=True)), exact)


def test_columns_are_rows_of_the_transpose():
    x = _operand(300, 40)
    quantised = _columns(x)
    assert quantised.values.shape == (40, 384) and quantised.scales.shape == (3, 40)
    want = _rows(jnp.pad(x, ((0, 84), (0, 0))).T)
    for got, expected in zip(quantised, want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("requantise", [False, True])
def test_columns_of_groups_start_at_multiples_of_128(requantise):
    sizes = (5, 0, 128, 130, 1)
    x = _operand(sum(sizes) + 9, 24)
    operand = _rows(x) if requantise else x
    plain = np.asarray(_dequantized(operand) if requantise else x)
    quantised = _columns(operand, jnp.asarray(sizes, jnp.int32))
    back = np.asarray(_dequantized(quantised))
    assert back.shape == (24, padded_rows(x.shape[0], len(sizes)))
    at, row = 0, 0
    for size in sizes:
        room = -(-size // 128) * 128
        group = plain[row : row + size].T
        part = Quantized(
            quantised.values[:, at : at + room], quantised.scales[at // 128 : (at + room) // 128]
        )
        if size:
            _check_rounding(
                part,
                np.pad(group, ((0, 0), (0, room - size))),
                _tiles(np.pad(group, ((0, 0), (0, room - size)))),
            )
        assert np.all(back[:, at + size : at + room] == 0)
        at, row = at + room, row + size
    assert np.all(back[:, at:] == 0)


@pytest.mark.parametrize("shape", [(256, 384), (130, 100), (3, 140, 256)])
def test_blocks(shape):
    w = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    quantised = _blocks(w)
    assert quantised.scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    for index in np.ndindex(*shape[:-2]):
        matrix = np.asarray(w[index])
        top = np.zeros(matrix.shape)
        for i in range(0, shape[-2], 128):
            for j in range(0, shape[-1], 128):
                top[i : i + 128, j : j + 128] = np.abs(matrix[i : i + 128, j : j + 128]).max()
        _check_rounding(Quantized(quantised.values[index], quantised.scales[index]), matrix, top)
    other = _blocks(w.swapaxes(-1, -2))
    np.testing.assert_array_equal(other.values.swapaxes(-1, -2), quantised.values)
    np.testing.assert_array_equal(other.scales.swapaxes(-1, -2), quantised.scales)


def test_no_nan_is_lost_among_many_rows():
    """XLA's maximum of floats on a CPU drops NaNs, from 32 rows on."""
    x = jnp.ones((64, 128)).at[jnp.arange(64), jnp.arange(64)].set(jnp.nan)
    assert (
        np.isnan(_dequantized(_rows(x))).all() and np.isnan(_dequantized(_rows(x, power_of_two=True))).all()
    )
    assert np.isnan(_dequantized(_columns(x))[:64]).all() and np.isnan(_dequantized(_blocks(x))).all()
    assert np.isnan(_packed_and_back(x)[1]).all()


def test_swiglu():
    x = _operand(6, 512) / 10
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    want = gate * up * (1 + np.tanh(gate / 2)) / 2  # The logistic function without overflow.
    got = _rows(x, swiglu=True)
    assert got.values.shape == (6, 256)
    scale = _tiles(want) / 448
    # Half a step of E4M3, and float32's own rounding of silu and the product.
    assert np.all(
        np.abs(_dequantized(got) - want)
        <= np.maximum(np.abs(want) * 2**-4, scale * 2**-10) * (1 + 1e-4) + 1e-30
    )


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_edges(power_of_two):
    x = jnp.ones((6, 256)).at[0].set(0).at[1, 3].set(jnp.inf).at[2, 200].set(jnp.nan).at[3].set(1e-45)
    x = x.at[4, 0].set(3e38)
    back = np.asarray(_dequantized(_rows(x, power_of_two=power_of_two)))
    assert np.all(back[0] == 0) and np.all(back[3] == 0)
    assert np.isnan(back[1, :128]).all() and np.all(back[1, 128:] == 1)
    assert np.isnan(back[2, 128:]).all() and np.all(back[2, :128] == 1)
    np.testing.assert_allclose(back[4, 0], 3e38, rtol=2**-4)
    np.testing.assert_array_equal(back[5], 1)


def test_e5m6_is_the_nearest_of_all_4096():
    codes = np.arange(1 << 12).astype(np.uint16) << 4
    numbers = codes.view(np.float16).astype(np.float64)
    finite = np.sort(numbers[np.isfinite(numbers)])
    rng = np.random.default_rng(0)
    x = np.concatenate([finite, rng.standard_normal(2000), rng.standard_normal(2000) * 1e-5, [65500.0, -0.0]])
    got = np.asarray(_there_and_back(jnp.asarray(x, jnp.float32)), np.float64)
    distance = np.abs(np.float32(x).astype(np.float64)[:, None] - finite[None, :]).min(1)
    inside = np.abs(x) < 65280  # Half a step above the largest finite number, 65,024.
    np.testing.assert_array_equal(np.abs(got - np.float32(x))[inside], distance[inside])
    assert np.all(np.isinf(got[~inside]))
    special = _there_and_back(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0]))
    assert np.isinf(special[:2].astype(np.float32)).all() and special[0] > 0 > special[1]
    assert np.isnan(np.float32(special[2])) and special[3] == 0
    assert pack_e5m6(jnp.zeros((2, 8))).shape == (2, 12)


def test_e5m6_ties_go_to_even():
    step = 2.0**-6
    x = jnp.asarray([1 + step / 2, 1 + 3 * step / 2], jnp.float32)
    np.testing.assert_array_equal(_there_and_back(x), [1, 1 + 2 * step])


def test_e5m6_rows_have_a_scale_a_tile():
    """Seven significant bits within 2^30 of a tile's largest number, scales that bring it below 65,024."""
    x = _operand(6, 200).at[3].set(0).at[4, 5].set(jnp.nan)
    packed, wide, narrow = _packed_and_back(x)
    assert packed.values.shape == (6, 300) and packed.scales.shape == (2, 6)
    scales = np.asarray(packed.scales)[:, [0, 1, 2, 5]]
    needed = _tiles(x)[:, [0, 128]].T[:, [0, 1, 2, 5]] / 65024
    assert np.all(np.frexp(scales)[0] == 0.5) and np.all((scales >= needed) & (scales < 2 * needed))
    wide = np.asarray(wide, np.float64)
    np.testing.assert_array_equal(wide, np.asarray(narrow, np.float64))  # Exact in bfloat16.
    plain, bad = np.asarray(x, np.float64), np.zeros(x.shape, bool)
    bad[4, :128] = True
    assert np.array_equal(np.isnan(wide), bad) and np.all(wide[3] == 0)
    half_step = np.maximum(np.abs(plain) * 2.0**-7, _tiles(x) * 2.0**-35)
    assert np.all(np.abs(wide - plain)[~bad] <= half_step[~bad])


def test_bad_calls_are_refused_with_the_reason():
    x = jnp.ones((4, 130))
    with pytest.raises(ValueError, match="expected float8_e4m3fn"):
        quantize_rows(x, dtype=jnp.int8)
    with pytest.raises(ValueError, match="side by side"):
        quantize_rows(x[:, :129], swiglu=True)
    with pytest.raises(ValueError, match="do not fit"):
        dequantize(Quantized(x, jnp.ones((3, 3))))
    with pytest.raises(ValueError, match="even number"):
        pack_e5m6(x[:, :129])
    with pytest.raises(ValueError, match="pack_rows_e5m6"):
        pack_rows_e5m6(x[:, :129])
    with pytest.raises(ValueError, match="quantize_columns: scales"):
        quantize_columns(Quantized(quantize_rows(x).values, jnp.ones((4, 2))))
    if not ON_GPU:
        with pytest.raises(UnsupportedError, match="older than 0.11.2|not on cpu"):
            quantize_rows(x, implementation="mosaic_gpu")
        with pytest.raises(UnsupportedError, match="older than 0.11.2|not on cpu"):
            unpack_rows_e5m6(pack_rows_e5m6(x[:, :128]), implementation="mosaic_gpu")


@needs_mosaic_gpu
@pytest.mark.parametrize("power_of_two", [False, True])
def test_gpu_kernels_lower(power_of_two):
    x, sizes = jax.ShapeDtypeStruct((520, 512), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.int32)
    w = jax.ShapeDtypeStruct((3, 256, 128), jnp.float32)

    def every(x, w, sizes):
        saved = quantize_rows(x, power_of_two=power_of_two)
        return (
            saved,
            quantize_blocks(w, power_of_two=power_of_two),
            quantize_blocks(w, power_of_two=power_of_two, transpose=True),
            quantize_rows(x, power_of_two=power_of_two, swiglu=True),
            quantize_columns(x, power_of_two=power_of_two),
            quantize_columns(saved, sizes, power_of_two=power_of_two),
            unpack_e5m6(pack_e5m6(x)),
            unpack_rows_e5m6(pack_rows_e5m6(x)),
        )

    with target_platform("gpu"):
        text = jax.jit(every).trace(x, w, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 10


@needs_mosaic_gpu
def test_e5m6_kernels_take_stacks_and_leave_the_rest():
    def kernels(shape, dtype, to):
        def there_and_back(x):
            return unpack_e5m6(pack_e5m6(x), to)

        with target_platform("gpu"):
            traced = jax.jit(there_and_back).trace(jax.ShapeDtypeStruct(shape, dtype))
            return traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")

    assert kernels((3, 2, 4, 128), jnp.float32, jnp.float16) == 2
    assert kernels((8, 384), jnp.bfloat16, jnp.float32) == 2
    assert kernels((16, 256), jnp.float16, jnp.bfloat16) == 1
    assert kernels((256,), jnp.float32, jnp.float32) == 0
    assert kernels((8, 130), jnp.float32, jnp.float32) == 0

"""The FP8 kernels for Hopper on a card: against float64, the reference, and hostile neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad, mosaic_gpu_wgrad
from pallas_kernels.fp8_matmul import fp8_matmul, mosaic_gpu
from pallas_kernels.fp8_quantize import (
    PackedE5M6,
    Quantized,
    dequantize,
    pack_e5m6,
    pack_rows_e5m6,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    unpack_e5m6,
    unpack_rows_e5m6,
)
from tests.oracles import fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU"),
]

# Empty groups, single rows, every alignment to 8 rows, ends on and beside a tile's end (64, 128).
RAGGED = (0, 1, 7, 8, 9, 0, 63, 64, 65, 127, 128, 129, 0, 300, 2, 513, 0)
PAST = 8  # Rows after the last group; the sum of all is a multiple of 8.

# Hopper adds FP8 products with 13 bits after the largest one's leading bit: an error of some 2^-13 of
# |row| |column| in each 128 of the contraction, 1.6e-4 at most in what was measured.
TENSOR_CORES = 2.0**-12


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def _float64(x: Quantized):
    return np.asarray(dequantize(x), np.float64)


def _poison():
    """Leaves NaN in the memory that the next result is likely to get."""
    jnp.full((64 << 20,), jnp.nan, jnp.float32).block_until_ready()


def _close(got, left, right):
    got = np.asarray(got, np.float64)
    scale = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    assert np.all(np.isfinite(got))
    assert np.all(np.abs(got - left @ right.T) <= TENSOR_CORES * scale)


def _rows(x, **options):
    return quantize_rows(x, implementation="reference", **options)


@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(136, 200, 384), (1000, 704, 1408), (7, 20, 130), (2048, 512, 2048)]
)
def test_dense(m, n, k, wgrad):
    a = _normal(m, k).at[:, :100].multiply(1e4)  # Outliers in one tile.
    a, b = _rows(a), (_rows if wgrad else quantize_blocks)(_normal(n, k, seed=1))
    run = jax.jit(lambda a, b: fp8_matmul(a, b, out_dtype=jnp.float32, implementation="mosaic_gpu"))
    _poison()
    got = run(a, b)
    _close(got, _float64(a), _float64(b))
    np.testing.assert_array_equal(got, run(a, b))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tiling", [mosaic_gpu_wgrad.OVERLAPPED, *mosaic_gpu_wgrad.WIDE], ids=lambda t: t.n)
def test_weight_gradients_are_the_same_in_tiles_of_any_width(tiling, dtype):
    shapes = (300, 176), (130, 400), (2816, 2048)
    for m, n in shapes:
        a, b = _rows(_normal(m, 640)), _rows(_normal(n, 640, seed=1))
        run = functools.partial(mosaic_gpu.matmul, a, b, out_dtype=jnp.dtype(dtype))
        narrow = run(tiling=mosaic_gpu_wgrad.GROUPED)
        _poison()
        np.testing.assert_array_equal(run(tiling=tiling), narrow)
    total = jnp.ones((2816, 2048), jnp.float32)
    if dtype == jnp.float32:
        np.testing.assert_array_equal(run(tiling=tiling, accumulate=total), narrow + total)


@pytest.mark.parametrize("wgrad", [False, True])
def test_every_128_are_what_the_tensor_cores_add(wgrad):
    """The arithmetic alone: against the published model of the tensor cores, their sums scaled in float64."""
    x = _normal(72, 384).at[:, :100].multiply(1e4).at[:, ::7].multiply(1e-3).at[5].set(0)
    a, b = _rows(x), (_rows if wgrad else quantize_blocks)(_normal(136, 384, seed=1))
    got = np.asarray(fp8_matmul(a, b, out_dtype=jnp.float32, implementation="mosaic_gpu"), np.float64)
    right = b.scales if wgrad else jnp.repeat(b.scales, 128, axis=0)[:136].T
    want, scale = np.zeros(got.shape), np.zeros(got.shape)
    for step in range(3):
        tiles = [np.asarray(y.values[:, 128 * step :][:, :128], np.float64) for y in (a, b)]
        factor = np.asarray(a.scales[step], np.float64)[:, None] * np.asarray(right[step], np.float64)
        want += fp8.tensor_cores(*tiles) * factor
        scale += np.linalg.norm(tiles[0], axis=1)[:, None] * np.linalg.norm(tiles[1], axis=1) * factor
    assert np.all(np.abs(got - want) <= 2e-6 * scale)  # Float32 scales and sums, as for the reference.


@pytest.mark.parametrize("wgrad", [False, True])
def test_promotion_keeps_what_14_bits_lose(wgrad):
    """One large product, thousands of ones, and the large one taken back: exact only in float32."""
    k = 4096
    a = np.zeros((64, k), np.float32)
    a[:, 0], a[:, 128:-128], a[:, -128] = 448, 1, 448
    steps = k // 128
    left = Quantized(jnp.asarray(a).astype(jnp.float8_e4m3fn), jnp.ones((steps, 64)))
    scales = jnp.ones((steps, 64) if wgrad else (1, steps))
    for last in (0, -448):
        right = Quantized(left.values.at[:, -128].set(last), scales)
        got = fp8_matmul(left, right, out_dtype=jnp.float32, implementation="mosaic_gpu")
        np.testing.assert_array_equal(got, 448 * 448 + k - 256 + 448 * last)


@pytest.mark.parametrize("wgrad", [False, True])
def test_without_promotion_they_are_lost(wgrad):
    """The control: ones beside a sum of 448^2 fall off the tensor cores' 14 bits; promoted, only those of its
    own 128 products do."""
    k = 4096
    a = np.ones((64, k), np.float32)
    a[:, 0] = 448
    left = Quantized(jnp.asarray(a).astype(jnp.float8_e4m3fn), jnp.full((k // 128, 64), 0.5))
    right = Quantized(left.values, jnp.full((k // 128, 64) if wgrad else (1, k // 128), 4.0))
    options = dict(out_dtype=jnp.float32, implementation="mosaic_gpu")
    kept, lost = (fp8_matmul(left, right, promote=promote, **options) for promote in (True, False))
    np.testing.assert_array_equal(kept, 2.0 * (448 * 448 + k - 128))
    assert np.all(lost <= 2.0 * (448 * 448 + k / 2))


def test_without_promotion_groups_are_scaled():
    rows, sizes = sum(RAGGED) + PAST, jnp.asarray(RAGGED, jnp.int32)
    whole = dict(per_tensor=True, implementation="reference")
    x = quantize_rows(_normal(rows, 256), **whole)
    w = quantize_blocks(_normal(len(RAGGED), 320, 256, seed=1), **whole)
    got = fp8_grouped_matmul(x, w, sizes, out_dtype=jnp.float32, promote=False, implementation="mosaic_gpu")
    start, x64, w64 = 0, _float64(x), _float64(w)
    for g, size in enumerate(RAGGED):
        _close(got[start : start + size], x64[start : start + size], w64[g])
        start += size
    left = quantize_columns(_normal(rows, 256), sizes, **whole)
    right = quantize_columns(_normal(rows, 320, seed=1), sizes, **whole)
    got = fp8_grouped_wgrad(left, right, sizes, promote=False, implementation="mosaic_gpu")
    want = fp8_grouped_wgrad(left, right, sizes, implementation="reference")
    scale = np.linalg.norm(_float64(left)) * np.linalg.norm(_float64(right))
    assert np.max(np.abs(np.asarray(got) - np.asarray(want))) <= TENSOR_CORES * scale


def test_grouped():
    rows, sizes = sum(RAGGED) + PAST, jnp.asarray(RAGGED, jnp.int32)
    x, w = _rows(_normal(rows, 256)), quantize_blocks(_normal(len(RAGGED), 320, 256, seed=1))
    run = jax.jit(
        lambda x, w, s: fp8_grouped_matmul(x, w, s, out_dtype=jnp.float32, implementation="mosaic_gpu")
    )
    _poison()
    got, x64, w64, start = run(x, w, sizes), _float64(x), _float64(w), 0
    for g, size in enumerate(RAGGED):
        _close(got[start : start + size], x64[start : start + size], w64[g])
        start += size
    assert np.all(np.asarray(got)[start:] == 0)
    np.testing.assert_array_equal(got, run(x, w, sizes))
    for spread in ((0,) * 16 + (rows,), (rows,) + (0,) * 16, (0,) * 17):  # Sizes known only on the device.
        again = np.asarray(run(x, w, jnp.asarray(spread, jnp.int32)))
        group = int(np.argmax(spread))
        _close(again[: sum(spread)], x64[: sum(spread)], w64[group])
        assert np.all(again[sum(spread) :] == 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grouped_wgrad(dtype):
    rows, sizes = sum(RAGGED) + PAST, jnp.asarray(RAGGED, jnp.int32)
    left = quantize_columns(_normal(rows, 256), sizes, implementation="reference")
    right = quantize_columns(_normal(rows, 320, seed=1), sizes, implementation="reference")
    run = jax.jit(lambda a, b, s: fp8_grouped_wgrad(a, b, s, out_dtype=dtype, implementation="mosaic_gpu"))
    _poison()
    got, a64, b64, at = run(left, right, sizes), _float64(left), _float64(right), 0
    for g, size in enumerate(RAGGED):
        room = -(-size // 128) * 128
        a, b = a64[:, at : at + room], b64[:, at : at + room]
        if dtype == jnp.float32:
            _close(got[g], a, b)
        else:  # Half a unit in the last place of bf16 more.
            scale = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
            want = a @ b.T
            error = np.abs(np.asarray(got[g], np.float64) - want)
            assert np.all(error <= 2.0**-8 * np.abs(want) + TENSOR_CORES * scale)
        at += room
    np.testing.assert_array_equal(np.asarray(got), np.asarray(run(left, right, sizes)))


@pytest.mark.parametrize("kind", ["block", "row", "groups"])
def test_adds_where_the_sum_lies(kind):
    """The kernel's own result plus what was there, rounded once; the same bits from donated memory."""
    sizes = jnp.asarray(RAGGED, jnp.int32)
    if kind == "groups":
        rows = sum(RAGGED) + PAST
        a, b = (quantize_columns(_normal(rows, n, seed=n), sizes) for n in (256, 320))
        shape = (len(RAGGED), 256, 320)
    else:
        a, b = _rows(_normal(704, 512)), (quantize_blocks if kind == "block" else _rows)(_normal(320, 512))
        shape = (704, 320)

    def run(before, a, b):
        if kind == "groups":
            return fp8_grouped_wgrad(a, b, sizes, accumulate=before, implementation="mosaic_gpu")
        options = dict(out_dtype=jnp.float32, implementation="mosaic_gpu")
        return fp8_matmul(a, b, accumulate=before, **options)

    before = 100 * jax.random.normal(jax.random.key(0), shape)
    want = np.asarray(jax.jit(run)(None, a, b)) + np.asarray(before)
    np.testing.assert_array_equal(jax.jit(run)(before, a, b), want)
    assert not before.is_deleted()
    np.testing.assert_array_equal(jax.jit(run, donate_argnums=0)(before, a, b), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_leaks_between_groups(bad):
    rows, sizes = sum(RAGGED) + PAST, jnp.asarray(RAGGED, jnp.int32)
    x, dout = _normal(rows, 256), _normal(rows, 128, seed=1)
    w = quantize_blocks(_normal(len(RAGGED), 128, 256, seed=2))
    ends = np.cumsum(RAGGED)
    for g in (4, 9, 13):
        ours = slice(ends[g] - RAGGED[g], ends[g])
        poisoned = quantize_rows(x.at[ours].set(bad), implementation="mosaic_gpu")
        out = np.asarray(fp8_grouped_matmul(poisoned, w, sizes, implementation="mosaic_gpu"), np.float32)
        left = quantize_columns(poisoned, sizes, implementation="mosaic_gpu")
        right = quantize_columns(dout, sizes, implementation="mosaic_gpu")
        gradient = np.asarray(fp8_grouped_wgrad(left, right, sizes, implementation="mosaic_gpu"))
        assert not np.isfinite(out[ours]).any()
        assert np.isfinite(np.delete(out, np.r_[ours], axis=0)).all()
        for h in range(len(RAGGED)):
            assert np.isfinite(gradient[h]).all() == (h != g)


def _same(got, want):
    """Equal but for numbers that float32 rounding puts on the other side of a tie, one step away."""
    assert got.values.shape == want.values.shape and got.scales.shape == want.scales.shape
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)
    differing = np.asarray(got.values.view(jnp.uint8) != want.values.view(jnp.uint8))
    assert np.mean(differing) < 1e-3
    np.testing.assert_allclose(dequantize(got), dequantize(want), rtol=2**-2, atol=1e-30)


@pytest.mark.parametrize(
    "options", [{}, {"power_of_two": True}, {"swiglu": True}, {"dtype": jnp.float8_e5m2}]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows(options, dtype):
    x = _normal(136, 768).at[3].set(0).at[5, 7].set(1e4).at[6].set(1e-30).astype(dtype)
    got = quantize_rows(x, implementation="mosaic_gpu", **options)
    _same(got, quantize_rows(x, implementation="reference", **options))
    again = quantize_rows(x, implementation="mosaic_gpu", **options)
    assert all(jnp.array_equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("options", [{}, {"power_of_two": True}, {"dtype": jnp.float8_e5m2}])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("requantise", [False, True])
def test_columns(options, grouped, requantise):
    x = _normal(sum(RAGGED) + PAST, 256).at[3].set(0).at[:, 9].set(0).at[5, 7].set(1e4)
    x = _rows(x) if requantise else x
    sizes = jnp.asarray(RAGGED, jnp.int32) if grouped else None
    _poison()
    got = quantize_columns(x, sizes, implementation="mosaic_gpu", **options)
    _same(got, quantize_columns(x, sizes, implementation="reference", **options))
    again = quantize_columns(x, sizes, implementation="mosaic_gpu", **options)
    assert all(jnp.array_equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("options", [{}, {"power_of_two": True}, {"dtype": jnp.float8_e5m2}])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)])
def test_blocks(shape, transpose, options):
    w = _normal(*shape).astype(jnp.float32).at[..., 5, 7].set(1e4).at[..., :128, 128:256].set(0)
    _poison()
    got = quantize_blocks(w, transpose=transpose, implementation="mosaic_gpu", **options)
    want = quantize_blocks(w, implementation="reference", **options)
    assert got.values.shape == (*shape[:-2], *(shape[:-3:-1] if transpose else shape[-2:]))
    if transpose:
        want = Quantized(*(x.swapaxes(-1, -2) for x in want))
    _same(got, want)
    again = quantize_blocks(w, transpose=transpose, implementation="mosaic_gpu", **options)
    assert all(jnp.array_equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_bad_number_shows_in_its_whole_tile(bad, power_of_two):
    x = _normal(64, 256).at[3, 5].set(bad)
    options = dict(power_of_two=power_of_two, implementation="mosaic_gpu")
    by_row = np.isnan(np.asarray(dequantize(quantize_rows(x, **options))))
    assert by_row[3, :128].all() and by_row.sum() == 128
    by_column = np.isnan(np.asarray(dequantize(quantize_columns(x, **options))))
    assert by_column[5].all() and by_column.sum() == by_column.shape[1]


def _e5m6_operand(rows, k):
    """Rows of eight kinds: normal, subnormal, ties, zeros, around the largest, infinite, NaN, any bits."""
    rng = np.random.default_rng(rows + k)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    x[1::8] = rng.integers(-1 << 9, 1 << 9, x[1::8].shape) * 2.0**-22  # Quarters of E5M6's last step.
    codes = rng.integers(0, 0x7BF, x[2::8].shape)
    numbers = [((codes + i) << 4).astype(np.uint16).view(np.float16).astype(np.float32) for i in range(2)]
    x[2::8] = rng.choice([-0.5, 0.5], codes.shape) * sum(numbers)
    x[1::8, ::128], x[2::8, ::128] = 65024, -65024  # The scale is one.
    x[3::8] = rng.choice([-0.0, 0.0], x[3::8].shape)
    x[4::8] = rng.choice([-1, 1], x[4::8].shape) * np.linspace(64500, 65600, k)
    x[4::8, 5], x[4::8, 6:8] = 3.3e38, 65280
    x[5::8, 3::7], x[5::8, 5::7], x[6::8, 2::9], x[6::8, 3::9] = np.inf, -np.inf, np.nan, -np.nan
    x[7::8] = rng.integers(0, 1 << 32, x[7::8].shape).astype(np.uint32).view(np.float32)
    return jnp.asarray(x)


def _bits(x):
    return np.asarray(x.view({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("k", [128, 256, 384])
@pytest.mark.parametrize("rows", [8, 64, 72, 200])
def test_e5m6_is_packed_to_the_bit(rows, k, dtype):
    x = _e5m6_operand(rows, k).astype(dtype)
    for pack in (pack_e5m6, pack_rows_e5m6):
        ours, want = (
            jax.jit(functools.partial(pack, implementation=name)) for name in ("mosaic_gpu", "reference")
        )
        _poison()
        got, again = ours(x), ours(x)
        for one, other, expected in zip(*map(jax.tree.leaves, (got, again, want(x))), strict=True):
            assert one.shape == expected.shape and one.dtype == expected.dtype
            np.testing.assert_array_equal(_bits(one), _bits(other))
            np.testing.assert_array_equal(one, expected)  # Scales are positive, and any NaN will do.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("k", [128, 256, 384])
@pytest.mark.parametrize("rows", [8, 64, 72, 200])
def test_e5m6_is_unpacked_to_the_bit(rows, k, dtype):
    rng = np.random.default_rng(rows + k)
    values = jnp.asarray(rng.integers(0, 256, (rows, k * 3 // 2)), jnp.uint8)
    powers = jnp.asarray(2.0 ** rng.integers(-100, 100, (k // 128, rows)), jnp.float32)
    powers = powers.at[0, 3].set(jnp.nan)
    scales = jnp.asarray(rng.standard_normal(powers.shape), jnp.float32)  # Rounded: any scale will do.
    cases = [(unpack_e5m6, values)]
    cases += [(unpack_rows_e5m6, PackedE5M6(values, of_rows)) for of_rows in (powers, scales)]
    for unpack, packed in cases:
        ours, reference = (
            jax.jit(functools.partial(unpack, dtype=dtype, implementation=name))
            for name in ("mosaic_gpu", "reference")
        )
        _poison()
        got, again, want = ours(packed), ours(packed), reference(packed)
        assert got.shape == (rows, k) and got.dtype == dtype
        np.testing.assert_array_equal(_bits(got), _bits(again))
        nan = np.isnan(np.asarray(want, np.float32))
        np.testing.assert_array_equal(np.isnan(np.asarray(got, np.float32)), nan)
        np.testing.assert_array_equal(_bits(got)[~nan], _bits(want)[~nan])


def test_e5m6_of_stacks():
    x = _e5m6_operand(72, 256).astype(jnp.bfloat16).reshape(3, 24, 256)
    packed = pack_e5m6(x, implementation="mosaic_gpu")
    np.testing.assert_array_equal(packed, pack_e5m6(x, implementation="reference"))
    got, want = (unpack_e5m6(packed, implementation=name) for name in ("mosaic_gpu", "reference"))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))

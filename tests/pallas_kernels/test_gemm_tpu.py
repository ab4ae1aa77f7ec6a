"""The matrix products on TPU: our FP8 kernels interpreted on CPU, all compiled where libtpu is installed."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import UnsupportedError, grouped_matmul, target_platform
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_wgrad
from pallas_kernels.fp8_grouped_matmul import mosaic_tpu as grouped
from pallas_kernels.fp8_matmul import fp8_matmul, mosaic_tpu
from pallas_kernels.fp8_quantize import (
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
)

# Empty groups, one row, a tile of 256 rows that four groups share, a group over several tiles.
SIZES = (5, 0, 17, 1, 300, 0, 128)
PAST = 6
RACES = pltpu.InterpretParams(detect_races=True)

_rows, _columns, _blocks = jax.jit(quantize_rows), jax.jit(quantize_columns), jax.jit(quantize_blocks)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def float64(x: Quantized):
    return np.asarray(jax.jit(dequantize)(x), np.float64)


def close(got, left, right):
    """Float32 sums: 2e-6 of |row| |column|, some thirty units in the last place."""
    scale = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    assert np.all(np.abs(np.asarray(got, np.float64) - left @ right.T) <= 2e-6 * scale)


@pytest.mark.parametrize(
    ("m", "n", "k", "by_block", "multiply_fp8"), [(300, 520, 384, True, True), (7, 20, 130, False, False)]
)
def test_dense_interpreted(m, n, k, by_block, multiply_fp8):
    """Several tiles each way, the last ones ragged; native FP8 and bfloat16 both multiply exactly."""
    a = _rows(normal(m, k).at[:, :100].multiply(1e4))  # Outliers in one tile.
    b = (_blocks if by_block else _rows)(normal(n, k, seed=1))
    got = mosaic_tpu.matmul(a, b, out_dtype=jnp.float32, multiply_fp8=multiply_fp8, interpret=True)
    close(got, float64(a), float64(b))


def test_groups_interpreted():
    rows, sizes = sum(SIZES) + PAST, jnp.asarray(SIZES, jnp.int32)
    x, w = _rows(normal(rows, 200)), _blocks(normal(len(SIZES), 300, 200, seed=1))
    x = Quantized(x.values.at[5].set(jnp.nan), x.scales)  # The one before is of another group.

    @jax.jit
    def run(x, w, sizes):
        options = dict(out_dtype=jnp.float32, multiply_fp8=True, interpret=RACES)
        return grouped.forward(x, w, sizes, **options)

    out, x64, w64, start = run(x, w, sizes), float64(x), float64(w), 0
    for g, size in enumerate(SIZES):
        own = np.arange(start, start + size)
        own = own[own != 5]
        close(out[own], x64[own], w64[g])
        start += size
    assert np.isnan(out[5]).all() and np.all(np.asarray(out)[start:] == 0)
    np.testing.assert_array_equal(out, run(x, w, sizes))
    assert not np.asarray(run(x, w, 0 * sizes)).any()
    assert not interpret_pallas_call.races.races_found


def test_grouped_wgrad_interpreted():
    rows, sizes = sum(SIZES) + PAST, jnp.asarray(SIZES, jnp.int32)
    x = _columns(normal(rows, 200), sizes)
    dout = _columns(normal(rows, 600, seed=1), sizes)
    x = Quantized(x.values.at[:, 128 + 3].set(jnp.nan), x.scales)  # Group 2.

    @jax.jit
    def run(x, dout, sizes):
        options = dict(out_dtype=jnp.float32, multiply_fp8=False, interpret=RACES)
        return grouped.wgrad(x, dout, sizes, **options)

    out, x64, d64, start = run(x, dout, sizes), float64(x), float64(dout), 0
    for g, size in enumerate(SIZES):
        room = slice(start, start - (-size // 128) * 128)
        if g == 2:
            assert np.isnan(out[g]).all()
        else:
            close(out[g], x64[:, room], d64[:, room])
        start = room.stop
    assert not np.asarray(run(x, dout, 0 * sizes)).any()
    assert not interpret_pallas_call.races.races_found


def test_promotion_of_cancelling_sums():
    """A large product, ones, and the large one taken back: each 128 of the contraction is summed apart."""
    a = np.ones((32, 512), np.float32)
    a[:, 0] = a[:, -1] = 448
    left = Quantized(jnp.asarray(a).astype(jnp.float8_e4m3fn), jnp.ones((4, 32)))
    right = Quantized(left.values.at[:, -1].set(-448), jnp.ones((4, 32)))
    got = mosaic_tpu.matmul(left, right, out_dtype=jnp.float32, multiply_fp8=True, interpret=True)
    np.testing.assert_array_equal(got, 510)


def test_on_cpu_they_are_refused():
    a = _rows(normal(8, 128))
    with pytest.raises(UnsupportedError, match="it runs on TPU, not on"):
        fp8_matmul(a, a, implementation="mosaic_tpu")


def struct(shape, scales, sharding=None):
    kinds = (shape, jnp.float8_e4m3fn), (scales, jnp.float32)
    return Quantized(*(jax.ShapeDtypeStruct(*kind, sharding=sharding) for kind in kinds))


def operands(m, n, k, groups, sharding=None):
    """(row-scaled, a weight, its stack, both operands of a weight gradient, sizes)."""
    steps, blocks, padded = -(-k // 128), -(-n // 128), (m // 128 + groups) * 128
    return (
        struct((m, k), (steps, m), sharding),
        struct((n, k), (blocks, steps), sharding),
        struct((groups, n, k), (groups, blocks, steps), sharding),
        struct((k, padded), (padded // 128, k), sharding),
        struct((n, padded), (padded // 128, n), sharding),
        jax.ShapeDtypeStruct((groups,), jnp.int32, sharding=sharding),
    )


def every(a, w, stack, left, right, sizes):
    return (
        fp8_matmul(a, w),
        fp8_matmul(left, right, out_dtype=jnp.float32),
        fp8_grouped_matmul(a, stack, sizes),
        fp8_grouped_wgrad(left, right, sizes),
    )


@pytest.mark.parametrize(
    ("kind", "multiplies"), [("TPU v5 lite", False), ("TPU v6 lite", False), ("TPU7x", True)]
)
def test_lowers_for_tpu(kind, multiplies):
    """For each generation; which of them multiply FP8 is read off the chip that is compiled for."""
    chip = AbstractDevice(kind, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)
    with target_platform("tpu"), jax.sharding.use_abstract_mesh(mesh):
        assert mosaic_tpu.native() == multiplies
        traced = jax.jit(every).trace(*operands(512, 640, 1408, 4))
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 4


@pytest.fixture(params=["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def device(request, monkeypatch):
    """A chip that is not there, to compile for."""
    libtpu = pytest.importorskip("libtpu", reason="needs libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Test workers side by side.
    monkeypatch.setenv("TPU_LIBRARY_PATH", os.environ.get("TPU_LIBRARY_PATH", libtpu.get_library_path()))
    return topologies.get_topology_desc(request.param, "tpu").devices[0]


def compiled(function, chip, *shapes):
    """The program that TPU's own compiler makes, and so within the chip's memories."""
    described = AbstractDevice(chip.device_kind, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=described)
    with target_platform("tpu"), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*shapes)
    return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


def test_fp8_compiles_for_tpu(device):
    """Several tiles each way, the last ones ragged."""
    shapes = operands(1000, 576, 1408, 8, jax.sharding.SingleDeviceSharding(device))
    assert compiled(every, device, *shapes).count("tpu_custom_call") == 4


def test_grouped_matmul_compiles_for_tpu(device):
    def loss(x, w, sizes):
        return jnp.sum(grouped_matmul(x, w, sizes, out_dtype=jnp.float32) ** 2)

    place = jax.sharding.SingleDeviceSharding(device)
    kinds = ((1001, 1408), jnp.bfloat16), ((5, 1408, 200), jnp.bfloat16), ((5,), jnp.int32)
    shapes = [jax.ShapeDtypeStruct(*kind, sharding=place) for kind in kinds]
    text = compiled(jax.grad(loss, argnums=(0, 1)), device, *shapes)
    assert text.count("tpu_custom_call") == 3

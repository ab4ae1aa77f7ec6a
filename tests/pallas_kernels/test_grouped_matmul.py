"""`grouped_matmul` against float64 numpy, its schedule, and the lowering of its GPU kernels."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import UnsupportedError, grouped_matmul, target_platform
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_tpu, schedule
from pallas_kernels.grouped_matmul.shapes import BENCHMARK

needs_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need JAX 0.11.2"
)
SIZES = (5, 0, 17, 1, 0, 40, 9)
PAST = 6


def _operands(k=24, n=40, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    rows = sum(SIZES) + PAST
    x, w, dout = (rng.standard_normal(shape) for shape in ((rows, k), (len(SIZES), k, n), (rows, n)))
    return *(jnp.asarray(a, dtype) for a in (x, w, dout)), jnp.asarray(SIZES, jnp.int32)


def _slices(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _forward64(x, w):
    out = np.zeros((x.shape[0], w.shape[2]))
    for g, rows in enumerate(_slices(SIZES)):
        out[rows] = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[g]
    return out


@pytest.mark.parametrize("implementation", ["reference", "blocked", "auto"])
@pytest.mark.parametrize("transpose", [False, True])
def test_forward_and_gradients(implementation, transpose):
    x, w, dout, sizes = _operands()
    rhs = w.swapaxes(1, 2) if transpose else w

    def loss(x, rhs):
        out = grouped_matmul(x, rhs, sizes, transpose_rhs=transpose, implementation=implementation)
        return jnp.sum(out * dout), out

    (_, out), (dx, drhs) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, rhs)
    x64, d64 = np.asarray(x, np.float64), np.asarray(dout, np.float64)
    dw = np.stack([x64[rows].T @ d64[rows] for rows in _slices(SIZES)])
    # Float32 sums of at most 40 products of unit variance.
    np.testing.assert_allclose(out, _forward64(x, w), atol=2e-5)
    np.testing.assert_allclose(dx, _forward64(dout, w.swapaxes(1, 2)), atol=2e-5)
    np.testing.assert_allclose(drhs, dw.swapaxes(1, 2) if transpose else dw, atol=2e-5)
    assert np.all(np.asarray(out)[sum(SIZES) :] == 0)


@pytest.mark.parametrize("transpose", [False, True])
def test_groups_of_a_few_rows(transpose):
    """One batched product for the first 6 rows of all groups; what is beyond, and past the sum, as ever."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((18, 24)), rng.standard_normal((7, 24, 10))
    rhs = jnp.asarray(w.swapaxes(1, 2) if transpose else w, jnp.float32)
    product = functools.partial(grouped_matmul, transpose_rhs=transpose, implementation="blocked")
    run = jax.jit(product)
    for sizes in ((3, 0, 1, 8, 0, 4, 0), (0, 0, 17, 0, 0, 0, 1), (0,) * 7):
        rows = jnp.asarray(x, jnp.float32).at[sum(sizes) :].set(jnp.inf)
        found = run(rows, rhs, jnp.asarray(sizes, jnp.int32))
        group = np.repeat(np.arange(7), sizes)
        expected = np.einsum("rk,rkn->rn", x[: len(group)], w[group])
        np.testing.assert_allclose(found[: len(group)], expected, atol=2e-5)
        assert np.all(np.asarray(found)[len(group) :] == 0)


def test_blocked_keeps_infinities_in_their_group():
    x, w, dout, sizes = _operands()
    grad = jax.grad(lambda w, x, dout: jnp.sum(grouped_matmul(x, w, sizes, implementation="blocked") * dout))
    rows = _slices(SIZES)[3]
    for poisoned in (grad(w, x.at[rows].set(jnp.inf), dout), grad(w, x, dout.at[rows].set(jnp.inf))):
        finite = np.isfinite(poisoned).all(axis=(1, 2))
        assert finite.tolist() == [g != 3 for g in range(len(SIZES))]


@pytest.fixture
def unchecked_signatures():
    """Calls get through to the op's own checks, as they do outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bad_calls_are_refused_with_the_reason(unchecked_signatures):
    x, w, _, sizes = _operands()
    with pytest.raises(ValueError, match="do not contract"):
        grouped_matmul(x, w.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match="expected \\(7,\\)"):
        grouped_matmul(x, w, sizes[:-1])
    if jax.default_backend() != "gpu":
        with pytest.raises(UnsupportedError, match="older than 0.11.2|not on cpu"):
            grouped_matmul(x, w, sizes, implementation="mosaic_gpu")


# One shape, so that hypothesis draws sizes and nothing is compiled twice.
EIGHT_SIZES = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 128), st.just(0)), min_size=8, max_size=8)
ROWS, TILE_ROWS = 8 * 128, 64
_row_tiles = jax.jit(lambda sizes: schedule.row_tiles(sizes, ROWS, TILE_ROWS))
_groups_by_size = jax.jit(schedule.groups_by_size)


@settings(max_examples=60, deadline=None)
@given(EIGHT_SIZES)
def test_tiles_cover_every_row_once_and_never_two_groups(sizes):
    tiles, count = _row_tiles(np.asarray(sizes, np.int32))
    assert int(count[0]) <= tiles.shape[0]
    owner = np.full(ROWS, -1)
    for group, start, low, high in np.asarray(tiles)[: int(count[0])]:
        assert start % schedule.ALIGN == 0 and start <= low < high <= min(start + TILE_ROWS, ROWS)
        assert np.all(owner[low:high] == -1)
        owner[low:high] = group
    np.testing.assert_array_equal(owner, np.repeat(np.arange(9), [*sizes, ROWS - sum(sizes)]))


@settings(max_examples=40, deadline=None)
@given(EIGHT_SIZES)
def test_groups_come_from_the_largest_down(sizes):
    table = np.asarray(_groups_by_size(np.asarray(sizes, np.int32)))
    assert sorted(table[:, 0]) == list(range(8))
    lengths = table[:, 2] - table[:, 1]
    assert np.all(np.diff(lengths) <= 0)
    np.testing.assert_array_equal(lengths, np.asarray(sizes)[table[:, 0]])
    np.testing.assert_array_equal(table[:, 2], np.cumsum(sizes)[table[:, 0]])


def test_benchmark_sizes_fit():
    for shape in BENCHMARK:
        sizes = shape.sizes()
        assert sizes.shape == (shape.groups,) and sizes.min() >= 0 and sizes.sum() <= shape.rows


def _lowered(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def _shapes(rows, k, n, groups, dtype=jnp.bfloat16):
    struct = jax.ShapeDtypeStruct
    return struct((rows, k), dtype), struct((groups, k, n), dtype), struct((groups,), jnp.int32)


@needs_mosaic_gpu
@pytest.mark.parametrize(("rows", "k", "n", "groups"), [(4096, 2048, 2816, 64), (1001, 72, 40, 5)])
def test_gpu_kernels_lower(rows, k, n, groups):
    """Layouts and shared memory are checked on any machine; both layouts of the weights, and wgrad."""

    def loss(x, w, sizes, transpose):
        rhs = w.swapaxes(1, 2) if transpose else w
        return jnp.sum(grouped_matmul(x, rhs, sizes, transpose_rhs=transpose, out_dtype=jnp.float32))

    with target_platform("gpu"):
        for transpose in (False, True):
            text = _lowered(
                lambda x, w, s, t=transpose: jax.grad(loss, argnums=(0, 1))(x, w, s, t),
                *_shapes(rows, k, n, groups),
            )
            assert text.count("custom_call @mosaic_gpu") == 2  # dgrad and wgrad; nobody asks for the value.


@needs_mosaic_gpu
def test_auto_on_gpu_takes_the_kernel_for_bf16_only():
    with target_platform("gpu"):
        assert "mosaic_gpu" in _lowered(grouped_matmul, *_shapes(64, 64, 64, 2))
        assert "mosaic_gpu" not in _lowered(grouped_matmul, *_shapes(64, 64, 64, 2, jnp.float32))
        x, w, sizes = _shapes(64, 64, 64, 2, jnp.float32)
        assert "cast both to bfloat16" in mosaic_gpu.unsupported(x, w, False)


def test_inside_shard_map():
    """Groups spread over devices, rows of one device: values, and the gradient of what all devices share."""
    x, w, dout, _ = _operands()
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("expert")
    x, dout, sizes = x[:40], dout[:40], jnp.asarray([5, 0, 15, 7, 3, 10], jnp.int32)  # 20 rows a device.

    def loss(x, w, dout, sizes, shared):
        def local(x, w, dout, sizes, shared):
            own = grouped_matmul(x, w, sizes)
            same = grouped_matmul(x, shared, sizes)
            return jax.lax.psum(jnp.sum((own + same) * dout), "expert")

        whole = jax.sharding.PartitionSpec()
        specs = (split, split, split, split, whole)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=whole)(x, w, dout, sizes, shared)

    shared = w[:3]
    dw, dshared = jax.jit(jax.grad(loss, argnums=(1, 4)))(x, w[:6], dout, sizes, shared)
    x64, d64, ends = np.asarray(x, np.float64), np.asarray(dout, np.float64), np.cumsum([5, 0, 15, 7, 3, 10])
    want = np.stack([x64[e - s : e].T @ d64[e - s : e] for e, s in zip(ends, sizes, strict=True)])
    # Float32 sums of at most 40 products of unit variance.
    np.testing.assert_allclose(dw, want, atol=2e-5)
    np.testing.assert_allclose(dshared, want[:3] + want[3:], atol=2e-5)


@needs_mosaic_gpu
def test_gpu_kernels_lower_inside_shard_map():
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("expert")

    def loss(x, w, sizes):
        return jnp.sum(grouped_matmul(x, w, sizes, out_dtype=jnp.float32))[None]

    def gradients(x, w, sizes):
        return jax.grad(lambda x, w: loss(x, w, sizes)[0], argnums=(0, 1))(x, w)

    with target_platform("gpu"):
        sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(split,) * 3, out_specs=split)
        assert "mosaic_gpu" in _lowered(sharded, *_shapes(128, 64, 64, 4))


@pytest.mark.parametrize("sizes", [SIZES, (0, 0, 3, 130, 0, 0, 128)])
def test_tpu_kernels_interpreted(sizes, monkeypatch):
    """Several groups in a tile, a group over several tiles, rows past the sum, infinite neighbours."""
    monkeypatch.setitem(mosaic_tpu.TILES, 4, (128, 128, 128))
    rng = np.random.default_rng(0)
    rows, k, n = sum(sizes) + PAST, 24, 40
    x, w, dout = (rng.standard_normal(shape) for shape in ((rows, k), (len(sizes), k, n), (rows, n)))
    group_sizes, ends = jnp.asarray(sizes, jnp.int32), np.cumsum(sizes)
    groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    lhs, rhs, right = (jnp.asarray(a, jnp.float32) for a in (x, w, dout))
    options = dict(out_dtype=jnp.float32, interpret=True)
    for transposed in (False, True):
        weights = rhs.swapaxes(1, 2) if transposed else rhs
        out = mosaic_tpu.forward(lhs, weights, group_sizes, transpose_rhs=transposed, **options)
        for g, part in enumerate(groups):
            np.testing.assert_allclose(out[part], x[part] @ w[g], atol=2e-5)  # Float32 sums of 24 products.
        assert np.all(np.asarray(out)[ends[-1] :] == 0)
    poisoned = lhs.at[ends[2] - 1].set(jnp.inf)  # The last row of group 2.
    gradient = np.asarray(mosaic_tpu.wgrad(poisoned, right, group_sizes, **options))
    for g, part in enumerate(groups):
        if g == 2:
            assert not np.isfinite(gradient[g]).any()
        else:
            np.testing.assert_allclose(gradient[g], x[part].T @ dout[part], atol=5e-5)  # Of up to 130.


def test_tpu_kernels_lower():
    def loss(x, w, sizes):
        return jnp.sum(grouped_matmul(x, w, sizes, out_dtype=jnp.float32))

    with target_platform("tpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*_shapes(1024, 256, 384, 4))
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2

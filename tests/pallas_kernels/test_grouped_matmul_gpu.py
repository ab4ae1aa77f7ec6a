"""The Hopper kernels of `grouped_matmul` on a card, against float64 and under hostile neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU"),
]

# Empty groups, single rows, every alignment to 8 rows, ends on and beside a tile's end (64, 128).
RAGGED = (0, 1, 7, 8, 9, 0, 63, 64, 65, 127, 128, 129, 0, 300, 2, 513, 0)
EVEN = (256, 256, 256, 256)


def _operands(sizes, k, n, past, seed=0):
    rng = np.random.default_rng(seed)
    rows = sum(sizes) + past

    def make(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    return make(rows, k), make(len(sizes), k, n), make(rows, n), jnp.asarray(sizes, jnp.int32)


def _slices(sizes):
    ends = np.cumsum(np.asarray(sizes))
    return [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]


def _forward64(x, w, sizes):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out = np.zeros((x.shape[0], w.shape[2]))
    for g, rows in enumerate(_slices(sizes)):
        out[rows] = x[rows] @ w[g]
    return out


def _wgrad64(x, dout, sizes):
    x, dout = np.asarray(x, np.float64), np.asarray(dout, np.float64)
    return np.stack([x[rows].T @ dout[rows] for rows in _slices(sizes)])


def _poison():
    """Leaves NaN in the memory that the next result is likely to get."""
    jnp.full((64 << 20,), jnp.nan, jnp.float32).block_until_ready()


def _close(got, want, left, right):
    # Float32 sums: 2e-6 of |row| |column|, some thirty units in the last place.
    scale = (
        np.linalg.norm(np.asarray(left, np.float64), axis=-1)[..., :, None]
        * np.linalg.norm(np.asarray(right, np.float64), axis=-2)[..., None, :]
    )
    assert np.all(np.isfinite(got))
    assert np.max(np.abs(got - want) / np.maximum(scale, 1e-30), initial=0) < 2e-6


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("sizes", "k", "n", "past"),
    [
        (RAGGED, 128, 256, 0),
        (RAGGED, 192, 704, 77),
        (EVEN, 64, 1408, 0),
        ((0, 0), 64, 64, 40),
        (RAGGED, 72, 40, 3),
    ],
)
def test_forward(sizes, k, n, past, transpose):
    x, w, _, group_sizes = _operands(sizes, k, n, past)
    rhs = w.swapaxes(1, 2) if transpose else w
    run = jax.jit(
        lambda x, rhs, s: grouped_matmul(
            x, rhs, s, transpose_rhs=transpose, out_dtype=jnp.float32, implementation="mosaic_gpu"
        )
    )
    _poison()
    got = np.asarray(run(x, rhs, group_sizes), np.float64)
    want = _forward64(x, w, sizes)
    for g, rows in enumerate(_slices(sizes)):
        _close(got[rows], want[rows], np.asarray(x)[rows], w[g])
    assert np.all(got[sum(sizes) :] == 0)
    np.testing.assert_array_equal(got, np.asarray(run(x, rhs, group_sizes), np.float64))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "k", "n", "past"),
    [(RAGGED, 128, 256, 0), (RAGGED, 192, 704, 77), (EVEN, 64, 1408, 0), (RAGGED, 72, 40, 3)],
)
def test_wgrad(sizes, k, n, past, dtype):
    x, _, dout, group_sizes = _operands(sizes, k, n, past)
    run = jax.jit(lambda x, dout, s: mosaic_gpu.wgrad(x, dout, s, out_dtype=dtype))
    _poison()
    got = run(x, dout, group_sizes)
    want = _wgrad64(x, dout, sizes)
    if dtype == jnp.bfloat16:
        # Half a unit in the last place of bf16, and the float32 sums before it.
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=2e-3)
    else:
        for g, rows in enumerate(_slices(sizes)):
            left = np.asarray(x, np.float64)[rows].T
            _close(np.asarray(got[g], np.float64), want[g], left, np.asarray(dout, np.float64)[rows])
    np.testing.assert_array_equal(np.asarray(got), np.asarray(run(x, dout, group_sizes)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_leaks_between_groups(bad):
    x, w, dout, sizes = _operands(RAGGED, 128, 256, 40)
    rows = _slices(RAGGED)
    for g in (4, 9, 13):
        poisoned = x.at[rows[g]].set(bad)
        out = np.asarray(mosaic_gpu.forward(poisoned, w, sizes, transpose_rhs=False, out_dtype=x.dtype))
        gradient = np.asarray(mosaic_gpu.wgrad(poisoned, dout, sizes, out_dtype=x.dtype))
        by_dout = np.asarray(mosaic_gpu.wgrad(x, dout.at[rows[g]].set(bad), sizes, out_dtype=x.dtype))
        for h, other in enumerate(rows):
            assert np.all(np.isfinite(out[other].astype(np.float32))) == (h != g or RAGGED[h] == 0)
            assert np.all(np.isfinite(gradient[h].astype(np.float32))) == (h != g)
            assert np.all(np.isfinite(by_dout[h].astype(np.float32))) == (h != g)
    past = np.asarray(mosaic_gpu.wgrad(x.at[sum(RAGGED) :].set(bad), dout, sizes, out_dtype=x.dtype))
    assert np.all(np.isfinite(past.astype(np.float32)))


def test_gradients_of_the_op():
    x, w, dout, sizes = _operands(RAGGED, 128, 192, 8)

    def loss(x, w):
        out = grouped_matmul(x, w, sizes, out_dtype=jnp.float32)  # "auto" takes the kernel.
        return jnp.sum(out * dout.astype(jnp.float32))

    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w)
    want_dx = _forward64(dout, w.swapaxes(1, 2), RAGGED)
    # Both gradients are bf16: half a unit in the last place, and the float32 sums before it.
    np.testing.assert_allclose(np.asarray(dx, np.float64), want_dx, rtol=2**-8, atol=2e-3)
    np.testing.assert_allclose(np.asarray(dw, np.float64), _wgrad64(x, dout, RAGGED), rtol=2**-8, atol=2e-3)


def test_sizes_known_only_on_the_device():
    x, w, _, _ = _operands((100, 28), 64, 64, 0)
    run = jax.jit(lambda s: grouped_matmul(x, w, s, out_dtype=jnp.float32, implementation="mosaic_gpu"))
    for sizes in ((100, 28), (0, 128), (128, 0), (5, 0), (0, 0)):
        got = np.asarray(run(jnp.asarray(sizes, jnp.int32)), np.float64)
        np.testing.assert_allclose(got, _forward64(x, w, sizes), atol=2e-6 * 64 * 4)

"""`gather_matvec` against float64 numpy, and its GPU kernel lowered at the shapes of a decode step."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels import UnsupportedError, target_platform
from pallas_kernels.gather_matvec import gather_matvec, mosaic_gpu

needs_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need JAX 0.11.2"
)
# rows, groups, k, n of `configs/small_gpu.py`: W_q with W_DKV, experts, heads, W_O, the head.
SHAPES = [
    (1, 1, 2048, 3648),
    (8, 66, 2048, 2816),
    (8, 66, 1408, 2048),
    (16, 16, 128, 512),
    (32, 16, 512, 128),
    (1, 1, 2048, 2048),
    (2, 1, 2048, 32768),
]


@pytest.mark.parametrize("implementation", ["reference", "sliced", "auto"])
@pytest.mark.parametrize("groups", [1, 5])
def test_each_row_meets_its_matrix(implementation, groups):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((7, 24)), rng.standard_normal((groups, 24, 10))
    indices = rng.integers(0, groups, 7)
    found = jax.jit(lambda *a: gather_matvec(*a, implementation=implementation))(
        jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(indices, jnp.int32)
    )
    expected = np.stack([row @ w[i] for row, i in zip(x, indices, strict=True)])
    np.testing.assert_allclose(found, expected, atol=2e-5)  # Float32 sums of 24 products of unit variance.


@pytest.mark.parametrize("implementation", ["reference", "sliced"])
def test_several_products_read_one_row_and_some_rows_nobody_reads(implementation):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 24)), rng.standard_normal((5, 24, 10))
    indices = np.array([4, 0, 3, 3, 1])
    found = gather_matvec(
        *(jnp.asarray(a, jnp.float32) for a in (x, w)),
        jnp.asarray(indices),
        each=2,
        implementation=implementation,
    )
    expected = np.stack([x[i // 2] @ w[j] for i, j in enumerate(indices)])
    np.testing.assert_allclose(found, expected, atol=2e-5)  # As above.


@pytest.fixture
def unchecked_signatures():
    """Calls get through to the op's own checks, as they do outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bad_calls_are_refused_with_the_reason(unchecked_signatures):
    x, w, i = jnp.ones((2, 32)), jnp.ones((3, 32, 128)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="do not fit"):
        gather_matvec(x[:, :16], w, i)
    with pytest.raises(ValueError, match="at most each=1"):
        gather_matvec(x[:1], w, i)
    with pytest.raises(UnsupportedError, match="0.11.2|not on cpu"):
        gather_matvec(x, w, i, implementation="mosaic_gpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_division_covers_the_work(shape):
    rows, _, k, n = shape
    how = mosaic_gpu.split(rows, k, n)
    assert k % (how.parts * how.warpgroups * how.flight) == 0 and how.width <= n


@needs_mosaic_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_lowering(shape):
    rows, groups, k, n = shape
    with target_platform("gpu"):
        bf16 = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, k), (groups, k, n)))
        kernel = functools.partial(gather_matvec, implementation="mosaic_gpu")
        lowered = jax.jit(kernel).trace(*bf16, jax.ShapeDtypeStruct((rows,), jnp.int32))
        assert "mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()

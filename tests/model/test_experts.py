"""Dispatch, expert products and combine against float64 numpy, for any skew of the load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import experts
from dsv3_jax.model.layers import rms_norm, swiglu
from pallas_kernels.grouped_matmul import blocked, grouped_matmul
from tests.oracles import ffn
from tests.oracles.gradient import directional_derivative

TOKENS, TOP_K, EXPERTS, D, F = 10, 3, 6, 8, 5
LOADS = {
    "spread": np.stack([np.random.default_rng(t).permutation(EXPERTS)[:TOP_K] for t in range(TOKENS)]),
    "three experts take everything": np.tile([4, 0, 5], (TOKENS, 1)),
    "one copy on the last": np.where(np.arange(TOKENS * TOP_K).reshape(TOKENS, TOP_K) == 29, 5, [[2, 1, 3]]),
}


def inputs():
    rng = np.random.default_rng(4)
    shapes = {
        "x": (TOKENS, D),
        "gates": (TOKENS, TOP_K),
        "gate_up": (EXPERTS, D, 2 * F),
        "down": (EXPERTS, F, D),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def oracle(t, indices):
    out = np.zeros((TOKENS, D))
    for token in range(TOKENS):
        for gate, expert in zip(t["gates"][token], indices[token], strict=True):
            w_gate, w_up = np.split(t["gate_up"][expert], 2, axis=1)
            weights = {"w_gate": w_gate, "w_up": w_up, "w_down": t["down"][expert]}
            out[token] += gate * ffn.swiglu(t["x"][token], weights)
    return out


@functools.cache
def value_and_gradients(implementation):
    def value(t, indices, cotangent):
        out = experts.experts_on_rows(t["x"], indices, t["gates"], t["gate_up"], t["down"], implementation)
        return jnp.vdot(out, cotangent), out

    return jax.jit(jax.value_and_grad(value, has_aux=True))


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("name", LOADS)
def test_values_and_gradients(name, implementation):
    indices, at = LOADS[name].astype(np.int32), inputs()
    cotangent = np.random.default_rng(8).normal(size=(TOKENS, D)).astype(np.float32)
    (_, out), gradient = value_and_gradients(implementation)(at, indices, cotangent)
    # float32 sums of 8 and 5 products, of size up to 30.
    np.testing.assert_allclose(out, oracle(at, indices), rtol=1e-5, atol=1e-4)
    rng = np.random.default_rng(9)
    for part in at:
        along = {k: rng.normal(size=v.shape) if k == part else np.zeros(v.shape) for k, v in at.items()}
        slope = directional_derivative(lambda t: float(np.vdot(oracle(t, indices), cotangent)), at, along)
        terms = np.asarray(gradient[part]) * along[part]
        assert abs(slope - terms.sum(dtype=np.float64)) < 1e-5 * np.abs(terms).sum()  # Rounding of each term.
    empty = np.setdiff1d(np.arange(EXPERTS), indices)
    assert not np.asarray(gradient["gate_up"])[empty].any() and not np.asarray(gradient["down"])[empty].any()


@pytest.mark.parametrize("name", LOADS)
def test_permutations_are_gathers_whose_transposes_are_right(name):
    """dispatch and combine are linear and each other's transpose, by <A x, y> = <x, A^T y>."""
    to = experts.plan(jnp.asarray(LOADS[name], jnp.int32), EXPERTS)
    flat = LOADS[name].reshape(-1)
    np.testing.assert_array_equal(to.group_sizes, np.bincount(flat, minlength=EXPERTS))
    np.testing.assert_array_equal(flat[to.order], np.sort(flat))
    assert all(np.diff(np.asarray(to.order)[np.sort(flat) == e]).min(initial=1) > 0 for e in range(EXPERTS))
    # Small integers: every sum is exact, so equality is bitwise.
    rng = np.random.default_rng(10)
    x, dx = (jnp.asarray(rng.integers(-8, 9, (TOKENS, D)), jnp.float32) for _ in range(2))
    rows, drows = (jnp.asarray(rng.integers(-8, 9, (TOKENS * TOP_K, D)), jnp.float32) for _ in range(2))
    sent, back = jax.vjp(lambda x: experts.dispatch(x, to), x)
    np.testing.assert_array_equal(sent, np.asarray(x)[np.asarray(to.order) // TOP_K])
    assert jnp.vdot(sent, drows) == jnp.vdot(x, back(drows)[0])
    merged, back = jax.vjp(lambda rows: experts.combine(rows, to), rows)
    assert jnp.vdot(merged, dx) == jnp.vdot(rows, back(dx)[0])
    np.testing.assert_array_equal(experts.combine(sent, to), TOP_K * x)  # There and back.
    gates = jnp.asarray(rng.integers(-8, 9, (TOKENS, TOP_K)), jnp.float32)
    ordered, back = jax.vjp(lambda gates: experts.sort_gates(gates, to), gates)
    assert jnp.vdot(ordered, drows[:, 0]) == jnp.vdot(gates, back(drows[:, 0])[0])


def test_cpu_cost_is_in_proportion_to_the_tokens_routed():
    """The products that run, counted at run time: near the rows routed, whatever the number of experts."""
    rows, d, f = 512, 4, 4
    rng = np.random.default_rng(0)
    for groups in (8, 64):
        for skewed in (False, True):
            share = np.eye(groups)[3] if skewed else np.full(groups, 1 / groups)
            sizes = rng.multinomial(rows, share).astype(np.int32)
            counted = []

            def dot_general(*args, dot_general=jax.lax.dot_general, counted=counted, **options):
                jax.debug.callback(lambda n=args[0].shape[0]: counted.append(n))
                return dot_general(*args, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(blocked.lax, "dot_general", dot_general)
                lhs, rhs = np.ones((rows, d), np.float32), np.ones((groups, d, f), np.float32)
                out = jax.jit(lambda *a: grouped_matmul(*a, implementation="auto"))(lhs, rhs, sizes)
                jax.block_until_ready(out)
                jax.effects_barrier()
            np.testing.assert_array_equal(out, np.full((rows, f), d))
            # At most a partly filled block for each expert besides the rows themselves.
            assert rows <= sum(counted) <= rows + groups * blocked.block_rows(rows, groups)
            assert sum(counted) <= 2.5 * rows < rows * groups


def test_norm_and_swiglu():
    rng = np.random.default_rng(11)
    x, scale = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 8), 8))
    # float32 arithmetic on numbers near 1.
    np.testing.assert_allclose(rms_norm(x, scale, 1e-2), ffn.rms_norm(x, scale, 1e-2), rtol=1e-5)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    np.testing.assert_allclose(swiglu(x), gate * ffn.sigmoid(gate) * up, rtol=1e-5)
    half = rms_norm(x.astype(jnp.bfloat16), scale, 1e-2)
    assert half.dtype == jnp.bfloat16
    # The norm works in float32: one rounding to 8 bits at the end, and one of x before.
    np.testing.assert_allclose(half.astype(jnp.float32), ffn.rms_norm(x, scale, 1e-2), rtol=2**-7)

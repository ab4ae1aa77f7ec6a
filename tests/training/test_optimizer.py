"""AdamW against optax, and against float64 numpy written from the algorithm (arXiv 1711.05101, alg. 2)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.training import optimizer

CONFIG = OptimizerConfig()
STEPS = 6
DTYPES = ["float32", "bfloat16"]


def make_params() -> dict:
    """Parameters named as Flax names them; the norms of scanned layers are stacked, hence 2-d."""
    normal = np.random.default_rng(0).standard_normal
    return {
        "embed": {"embedding": jnp.asarray(normal((11, 4)), jnp.float32)},
        "layers": {
            "norm": {"scale": jnp.asarray(1 + 0.1 * normal((3, 4)), jnp.float32)},
            "mlp": {"kernel": jnp.asarray(normal((3, 4, 5)), jnp.float32)},
        },
        "head": {"kernel": jnp.asarray(normal((4, 11)), jnp.float32)},
    }


def make_grads(params: dict, step: int, size: float) -> dict:
    normal = np.random.default_rng(100 + step).standard_normal
    return jax.tree.map(lambda p: jnp.asarray(size * normal(p.shape), jnp.float32), params)


@functools.partial(jax.jit, static_argnames="config")
def jitted_step(params, state, grads, rate, config):
    norm, scale = optimizer.norm_and_clip_scale(grads, config.clip_norm)
    return optimizer.adamw_update(params, grads, state, rate, scale, config, jnp.isfinite(norm))


def ours(config, rates: list[float], size: float):
    params = make_params()
    state = optimizer.init(params, config)
    for i, rate in enumerate(rates):
        params, state = jitted_step(params, state, make_grads(params, i, size), rate, config)
    return params, state


@pytest.mark.parametrize(
    ("clip_norm", "size", "decay_embeddings"),  # Size 1e-3: gradients below the clipping norm; 10: above.
    [(0.0, 10.0, True), (1.0, 1e-3, False), (1.0, 10.0, True)],
)
def test_equals_optax(clip_norm, size, decay_embeddings):
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm, decay_embeddings=decay_embeddings)
    rates = [1e-2 / (i + 1) for i in range(STEPS)]

    def mask(params):
        return {
            "embed": {"embedding": decay_embeddings},
            "layers": {"norm": {"scale": False}, "mlp": {"kernel": True}},
            "head": {"kernel": True},
        }

    reference = optax.adamw(lambda i: 1e-2 / (i + 1), config.b1, config.b2, config.eps, mask=mask,
                            weight_decay=config.weight_decay)  # fmt: skip
    if clip_norm:
        reference = optax.chain(optax.clip_by_global_norm(clip_norm), reference)
    expected = make_params()
    state, update = reference.init(expected), jax.jit(reference.update)
    for i in range(STEPS):
        updates, state = update(make_grads(expected, i, size), state, expected)
        expected = optax.apply_updates(expected, updates)

    params, _ = ours(config, rates, size)
    # Same formula, other order of operations: a few fp32 roundings (6e-8) of values near 1, in 6 steps.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), params, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64_numpy_with_moments_rounded_where_stored(dtype):
    config = dataclasses.replace(CONFIG, moment_dtype=dtype)
    rounded = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    rates, size = [1e-2] * STEPS, 3.0
    params, state = ours(config, rates, size)
    assert {x.dtype.name for x in jax.tree.leaves((state.mu, state.nu))} == {dtype}
    assert int(state.count) == STEPS

    weights = [np.asarray(p, np.float64) for p in jax.tree.leaves(make_params())]
    decays = [True, True, True, False]  # Leaves in key order: embedding, head, mlp kernel, norm scale.
    mu = [np.zeros_like(p) for p in weights]
    nu = [np.zeros_like(p) for p in weights]
    for t, rate in enumerate(rates, start=1):
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(make_grads(make_params(), t - 1, size))]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        for i, g in enumerate(grads):
            g = g * min(1.0, config.clip_norm / norm)
            mu[i] = 0.9 * mu[i] + 0.1 * g
            nu[i] = 0.95 * nu[i] + 0.05 * g * g
            step = mu[i] / (1 - 0.9**t) / (np.sqrt(nu[i] / (1 - 0.95**t)) + config.eps)
            mu[i], nu[i] = mu[i].astype(rounded).astype(np.float64), nu[i].astype(rounded).astype(np.float64)
            weights[i] = weights[i] - rate * (step + config.weight_decay * decays[i] * weights[i])
    # fp32: a step of 1e-2 times an update near 1 known to 1e-6. bf16: a moment that lies within fp32
    # rounding of a tie may round the other way, 2**-8 of one update of 1e-2; seen on few elements.
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2 * 2**-8 * 1.5}[dtype]
    for actual, expected in zip(jax.tree.leaves(params), weights, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
        if dtype == "bfloat16":
            assert np.mean(np.abs(np.asarray(actual) - expected) > 2e-6) < 0.02


def test_norm_is_the_global_one_and_scale_brings_it_to_the_limit():
    grads = {"a": jnp.full((2, 2), 3.0), "b": jnp.full((7,), 4.0, jnp.bfloat16)}
    norm, scale = optimizer.norm_and_clip_scale(grads, 0.5)
    exact = np.sqrt(4 * 9 + 7 * 16)
    np.testing.assert_allclose(norm, exact, rtol=1e-6)  # One fp32 square root.
    np.testing.assert_allclose(norm * scale, 0.5, rtol=1e-6)
    assert optimizer.norm_and_clip_scale(grads, 100.0)[1] == 1.0
    assert optimizer.norm_and_clip_scale(grads, 0.0)[1] == 1.0


def test_mask_goes_by_name_not_by_dimensions():
    mask = optimizer.decay_mask(make_params(), decay_embeddings=True)
    assert mask == {
        "embed": {"embedding": True},
        "layers": {"norm": {"scale": False}, "mlp": {"kernel": True}},
        "head": {"kernel": True},
    }
    assert optimizer.decay_mask(make_params(), decay_embeddings=False)["embed"]["embedding"] is False


@pytest.mark.parametrize(("bad", "steps_before", "dtype"), [(np.nan, 0, "float32"), (np.inf, 2, "bfloat16")])
def test_a_non_finite_step_changes_nothing(bad, steps_before, dtype):
    config = dataclasses.replace(CONFIG, moment_dtype=dtype)
    params, state = ours(config, [1e-2] * steps_before, 1.0)
    grads = make_grads(params, 9, 1.0)
    grads["head"]["kernel"] = grads["head"]["kernel"].at[1, 2].set(bad)
    assert not jnp.isfinite(optimizer.norm_and_clip_scale(grads, config.clip_norm)[0])
    after = jitted_step(params, state, grads, 1e-2, config)
    jax.tree.map(np.testing.assert_array_equal, (params, state), after)


def test_needs_no_memory_beyond_the_state():
    """Donated, the step overwrites its state: no copy of parameters, moments or updates."""
    config = CONFIG
    params = {f"layer{i}": {"kernel": jnp.ones((64, 128))} for i in range(8)}

    def step(params, state, grads):
        norm, scale = optimizer.norm_and_clip_scale(grads, 1.0)
        return optimizer.adamw_update(params, grads, state, 1e-3, scale, config, jnp.isfinite(norm))

    state = optimizer.init(params, config)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < params["layer0"]["kernel"].nbytes
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves((params, state.mu, state.nu)))

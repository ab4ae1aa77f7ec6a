"""Rotary positions and YaRN against float64 numpy and against transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import RopeConfig
from dsv3_jax.model import rope
from tests.oracles.from_transformers import rope_parameters
from tests.oracles.rope import rotate
from tests.oracles.transformer import rope_of

V3 = RopeConfig(yarn_factor=40.0)
YARN = {
    "V3": (V3, 64),
    "V2": (dataclasses.replace(V3, yarn_mscale=0.707, yarn_mscale_all_dim=0.707), 64),
    "unequal factors": (dataclasses.replace(V3, yarn_mscale=0.7, yarn_mscale_all_dim=0.3), 64),
    "Kimi K2": (RopeConfig(theta=50000.0, yarn_factor=32.0, yarn_beta_fast=1.0, yarn_beta_slow=0.5), 64),
    "no ramp": (RopeConfig(yarn_factor=2.0, yarn_original_len=8, yarn_beta_fast=2.0, yarn_beta_slow=0.25), 4),
}


@pytest.mark.parametrize("name", YARN)
def test_yarn_equals_transformers(name):
    """The released code's frequencies, and its factor on cosine and sine."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, dim = YARN[name]
    theirs = transformers.DeepseekV3Config(
        qk_rope_head_dim=dim,
        head_dim=dim,
        max_position_embeddings=int(config.yarn_factor * config.yarn_original_len),
        rope_parameters=rope_parameters(config),
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    # transformers computes in float32: 24 bits, a few operations.
    np.testing.assert_allclose(rope.frequencies(config, dim), frequencies.numpy(), rtol=1e-6)
    cos, _ = rope.rotation(config, dim, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, factor, rtol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("name", [*YARN, "plain"])
def test_rotation_equals_oracle(name, interleaved):
    config, dim = YARN.get(name, (RopeConfig(), 16))
    config = dataclasses.replace(config, interleaved=interleaved)
    rng = np.random.default_rng(0)
    positions = np.array([[0, 1, 2, 3, 1000], [0, 1, 0, 1, 4095]], np.int32)  # The second row is packed.
    x = rng.normal(size=(2, 5, 3, dim)).astype(np.float32)
    turn = rope.rotation(config, dim, jnp.asarray(positions))
    heads = rope.rotate(jnp.asarray(x), turn, interleaved)
    shared = rope.rotate(jnp.asarray(x[:, :, 0]), turn, interleaved)

    oracle = rope_of(config, dim)
    expected = np.array(
        [
            [[rotate(x[b, i, n], int(positions[b, i]), oracle) for n in range(3)] for i in range(5)]
            for b in range(2)
        ]
    )
    # An angle of 4095 radians in float32 is off by up to 2.4e-4, half a unit in its last place.
    np.testing.assert_allclose(heads, expected, atol=2e-3)
    np.testing.assert_allclose(heads[:, :4], expected[:, :4], atol=2e-6)  # Small angles: rounding only.
    np.testing.assert_array_equal(shared, heads[:, :, 0])
    d_qk = 48
    assert rope.softmax_scale(config, d_qk) == pytest.approx(d_qk**-0.5 * oracle.softmax_factor, rel=1e-12)


def test_scores_depend_on_distance_only():
    """What rotary embedding is for; also under YaRN."""
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 64)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = [rope.rotation(V3, 64, jnp.full((1, 1), p, jnp.int32)) for p in (i, j)]
        return float(jnp.vdot(rope.rotate(q, at[0], True), rope.rotate(k, at[1], True)))

    # Sums of 64 products near 1, with angles rounded to 2^-17 at positions below 128.
    assert score(100, 90) == pytest.approx(score(15, 5), abs=1e-3)
    assert abs(score(100, 90) - score(100, 89)) > 0.1

"""The bytes that a decode step must read, against a count by hand of the shape that is measured."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.decode_gpu import model_config, step_bytes
from dsv3_jax.generation.weights import prepare
from dsv3_jax.model import Transformer, init_variables


def test_bytes_of_a_step():
    config = dataclasses.replace(model_config(4224), n_layers=2)  # One dense layer, one with experts.
    weights = jax.eval_shape(
        lambda key: prepare(init_variables(Transformer(config), key), config, jnp.bfloat16, True),
        jax.random.key(0),
    )
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
    dense, expert, head = 3 * 2048 * 8192, 3 * 2048 * 1408, 2048 * 32768
    narrow = 2 * (2 * attention + dense + head)
    wide = 4 * (2 * (2 * 2048 + 512) + 2048 * 64 + 64)  # Norms, router and its bias stay float32.
    found = step_bytes(weights, config, 1, 4096)
    assert found["experts"] == 2 * 8 * expert  # Six chosen, two shared.
    assert found["other_weights"] == narrow + wide
    assert found["cache"] == 4096 * 2 * 576 * 2
    # Of 64 experts, 32 texts with 6 uniform choices each hit 64 (1 - (58 / 64)^32) on average.
    many = step_bytes(weights, config, 32, 4096)
    assert abs(many["experts"] / (2 * expert) - (64 * (1 - (58 / 64) ** 32) + 2)) < 1e-6
    assert many["cache"] == 32 * found["cache"]

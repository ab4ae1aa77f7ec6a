"""Small random models of every kind, and what the training forward says of a text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.generation import Generator
from dsv3_jax.model import Transformer
from tests.model.test_transformer import YARN, changed, make_variables

SIZE = {"n_layers": 2, "max_seq_len": 64}
CONFIGS = {
    "v3": changed(rope=YARN | {"yarn_mscale": 0.7}, **SIZE),
    "v2": changed(
        attention={"q_lora_rank": 0},
        moe={"gate": "softmax", "group_score": "max", "normalize_gates": False, "n_dense_layers": 0},
        mtp={"depth": 0},
        **SIZE,
    ),
    "mha": changed(attention={"kind": "mha"}, moe={"n_dense_layers": 2}, mtp={"depth": 0}, **SIZE),
    "gqa": changed(
        attention={"kind": "gqa", "n_heads": 4, "n_kv_heads": 2},
        moe={"n_dense_layers": 2},
        rope={"interleaved": False},
        tie_embeddings=True,
        **SIZE,
    ),
    # Compiles quickly: for what surrounds the model.
    "small": changed(n_layers=1, moe={"n_dense_layers": 1}, mtp={"depth": 1}, max_seq_len=64),
    "mqa": changed(attention={"kind": "mqa"}, mtp={"kind": "parallel"}, moe={"n_shared": 0}, **SIZE),
}


@functools.cache
def variables(name):
    return make_variables(Transformer(CONFIGS[name]))


@functools.cache
def generator(name, chunk=16, **options):
    """A generator; tests that use it with batches of three share its compiled programs."""
    return Generator(CONFIGS[name], variables(name), chunk=chunk, **options)


@functools.cache
def _forward(name):
    return jax.jit(lambda v, tokens: _logits(Transformer(CONFIGS[name]).apply(v, tokens)))


def _logits(outputs):
    return jnp.matmul(outputs.hidden, outputs.head, precision="highest")


def teacher_forced(name, tokens):
    """Logits [seq, vocab] of one text, by the model that trains."""
    padded = np.zeros((1, 48), np.int32)  # Causal: what follows changes nothing, and one shape compiles once.
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(name)(variables(name), padded))[0, : len(tokens)]

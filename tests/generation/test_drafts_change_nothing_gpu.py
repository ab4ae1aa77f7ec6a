"""On a GPU a step of several tokens finds for each what decoding one by one finds, to the bit.

Greedy speculation then writes the text of plain decoding, in bf16 too, whatever the batch is.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import proxy_300m, small_gpu
from dsv3_jax.config_checks import typed
from dsv3_jax.generation import Generator, SamplingParams, forward
from dsv3_jax.generation.cache import init_cache
from dsv3_jax.generation.prefill import prefill
from dsv3_jax.generation.programs import FEW_ROWS, Program
from dsv3_jax.generation.weights import kernels_for, prepare
from dsv3_jax.model import Transformer
from dsv3_jax.model.transformer import init_variables

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
PRESETS = {"proxy_300m": proxy_300m, "small_gpu": small_gpu}
PROMPT, NEW, CAPACITY = 100, 60, 256  # Across the border of a block of 128 entries.


def model_of(name, depth, heads=None):
    """A preset's widths in few layers."""
    config = typed(PRESETS[name].get_config()).model
    attention = dataclasses.replace(config.attention, n_heads=heads or config.attention.n_heads)
    mtp = dataclasses.replace(config.mtp, depth=depth)
    return dataclasses.replace(config, n_layers=2, max_seq_len=CAPACITY, attention=attention, mtp=mtp)


def variables_of(config):
    """Random parameters, in which logits spread and experts differ."""
    made = jax.jit(lambda key: init_variables(Transformer(config), key))(jax.random.key(0))
    return jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, made)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "name, depth, heads, batch, cache_dtype",
    [
        ("proxy_300m", 3, None, 1, "bf16"),
        ("proxy_300m", 1, 24, 6, "int8"),
        ("small_gpu", 1, None, 3, "fp8"),
        ("small_gpu", 2, 128, 40, "bf16"),
    ],
)
def test_logits_do_not_depend_on_how_many_tokens_come_together(name, depth, heads, batch, cache_dtype):
    config = model_of(name, depth, heads)
    weights = jax.jit(prepare, static_argnums=(1, 2))(variables_of(config), config, jnp.dtype(jnp.bfloat16))
    text = np.random.default_rng(0).integers(0, config.vocab_size, (batch, PROMPT + NEW)).astype(np.int32)

    def decode(weights, cache, tokens, config):
        _, logits, cache = forward.decode(weights, cache, tokens, jnp.ones(batch, bool), config)
        return logits, dataclasses.replace(cache, lengths=cache.lengths + tokens.shape[1])

    step = Program(decode, FEW_ROWS, donate="cache").of(config)

    def logits(width):
        cache = init_cache(config, batch, CAPACITY, cache_dtype)
        read = np.full(batch, PROMPT, np.int32)
        cache, _ = prefill(weights, cache, text[:, :PROMPT], read, config, chunk=64, drafts=0)
        found = []
        for at in range(PROMPT, PROMPT + NEW, width):
            with kernels_for(weights):
                new, cache = step(weights, cache, text[:, at : at + width], config)
            found.append(np.asarray(new))
        return np.concatenate(found, 1)

    alone = logits(1)
    assert np.isfinite(alone).all() and alone.std() > 0.1
    for width in range(2, depth + 2):
        np.testing.assert_array_equal(logits(width), alone, err_msg=f"{width} tokens at a time")


def prompts_of(count):
    """Of many lengths, and so are the sequences of a batch at any step."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, n).tolist() for n in rng.integers(5, 150, count)]


def texts(config, variables, batches, drafts):
    """Of each batch of prompts the tokens that greedy decoding writes."""
    params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
    way = Generator(config, variables, None, dtype=jnp.bfloat16, speculate=drafts)
    return [[text.tokens for text in way.generate(batch, params)] for batch in batches]


@gpu
@needs_gpu
@pytest.mark.parametrize("batch, drafts", [(1, 3), (4, 1), (12, 1), (48, 2)])
def test_greedy_speculation_writes_the_text_of_plain_decoding(batch, drafts):
    config = model_of("proxy_300m", drafts)
    variables, prompts = variables_of(config), prompts_of(max(batch, 4))
    batches = [prompts[at : at + batch] for at in range(0, len(prompts), batch)]
    plain, speculative = (texts(config, variables, batches, number) for number in (0, drafts))
    assert speculative == plain


OTHER_PROCESS = """
import json, sys
sys.path[:0] = {paths}
from tests.generation import test_drafts_change_nothing_gpu as this
config = this.model_of("proxy_300m", 1)
print(json.dumps(this.texts(config, this.variables_of(config), [this.prompts_of({batch})], {drafts})))
"""


@gpu
@needs_gpu
def test_another_process_writes_the_same_text():
    """`dsv3 generate` with and without `--speculate` are two, and each compiles for itself."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    root = str(pathlib.Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OTHER_PROCESS.format(paths=[root], batch=20, drafts=drafts)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for drafts in (0, 1)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    plain, speculative = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert len(plain[0]) == 20 and {len(text) for text in plain[0]} == {NEW}
    assert speculative == plain

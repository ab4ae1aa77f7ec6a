"""The same training step with and without a pipeline, for tests to compare."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    TrainConfig,
)
from dsv3_jax.parallel.mesh import make_mesh, use_mesh
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import batch_sharding, gradients

SEQ, VOCAB = 8, 13
MODEL = ModelConfig(
    vocab_size=VOCAB,
    d_model=12,
    n_layers=3,
    d_ff=16,
    max_seq_len=SEQ,
    init_std=0.2,
    # Of all kinds of attention the one of fewest operations: compilation is what takes the time here.
    attention=AttentionConfig(kind="mqa", implementation="reference", n_heads=2, head_dim=4),
    moe=MoEConfig(
        implementation="reference", n_dense_layers=1, n_experts=4, top_k=2, d_ff_expert=8, sequence_loss=0.1
    ),
)
# Whether bf16 values between two operations are rounded, or not where they are fused, is not what is tested.
OPTIONS = {"xla_allow_excess_precision": False}


def config(name="", micros=1, mesh=None, mtp=0, layers=3, rows=None, model=MODEL, **fields):
    """A run of `micros` micro-batches."""
    mesh = mesh or MeshConfig(data=1)
    rows = rows or 2 * micros
    model = dataclasses.replace(model, mtp=MTPConfig(depth=mtp), n_layers=layers)
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **fields.pop("moe", {})))
    train = dict(
        seq_len=model.max_seq_len, batch_size=rows, micro_batch_size=rows // micros, precision="fp32"
    )
    return Config(
        model=model,
        data=DataConfig(mask_documents=True),
        train=TrainConfig(**train | fields, pipeline=name),
        mesh=mesh,
    )


def make_batch(c):
    """Documents of 5 tokens, some targets masked; the first rows are the same for any number of them."""
    drawn = np.random.default_rng(0).random((c.train.batch_size, 3, c.train.seq_len))
    places = np.broadcast_to(np.arange(c.train.seq_len, dtype=np.int32), drawn[:, 0].shape)
    return {
        "tokens": (drawn[:, 0] * c.model.vocab_size).astype(np.int32),
        "targets": (drawn[:, 1] * c.model.vocab_size).astype(np.int32),
        "positions": places % 5,
        "segment_ids": places // 5,
        "loss_mask": drawn[:, 2] > 0.2,
    }


def compiled(c):
    """n_micro -> (gradients, losses, counts) on the host, of a state that depends on the model alone.

    Without a pipeline the first `n_micro` micro-batches are taken; a pipeline takes all that there are.
    """
    mesh = make_mesh(c.mesh)
    abstract = abstract_state(c, mesh)
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        value = ("scale" in jax.tree_util.keystr(path)) + 0.3 * rng.standard_normal(leaf.shape)
        # The same numbers in float64.
        return jax.device_put(value.astype(np.float32).astype(leaf.dtype), leaf.sharding)

    state = abstract._replace(
        params=jax.tree_util.tree_map_with_path(draw, abstract.params),
        router=jax.tree_util.tree_map_with_path(draw, abstract.router),  # A bias that decides.
    )
    mtp_weight = jnp.asarray(np.float32(0.3), jnp.float32)
    shape = -1, c.train.micro_batch_size, c.train.seq_len
    batch = {
        name: jax.device_put(x.reshape(shape), batch_sharding(mesh)) for name, x in make_batch(c).items()
    }

    def step(state, batch, n_micro):
        with use_mesh(mesh):
            return gradients(c, state, batch, n_micro, mtp_weight)

    program = jax.jit(step).lower(state, batch, 1).compile(OPTIONS)
    return lambda n_micro: jax.device_get(program(state, batch, n_micro))


plain = functools.cache(compiled)


def unpipelined(c, micros=None):
    """The same model on one device without a pipeline; `micros`: as many micro-batches at most."""
    batch_size = micros * c.train.micro_batch_size if micros else c.train.batch_size
    train = dataclasses.replace(c.train, pipeline="", remat="none", batch_size=batch_size)
    return dataclasses.replace(c, train=train, mesh=MeshConfig(data=1))


class Errors(NamedTuple):
    """Of a pipeline beside none, relative: the worst over all arrays."""

    loss: float  # Of any of the losses.
    entry: float  # Of any entry of a gradient, to the array's largest one.
    norm: float  # Of a gradient's norm.
    counts: int  # Tokens that other experts took.


def errors(c, micros=None):
    """`micros`: of which the run without a pipeline takes as many as `c` has; it then serves other counts."""
    n_micro = c.train.batch_size // c.train.micro_batch_size
    want_grads, want_losses, want_counts = plain(unpipelined(c, micros))(n_micro)
    grads, losses, counts = compiled(c)(n_micro)
    # One loss may be near 0, where another is not.
    worst = [abs(a - b).max() / abs(b).max() for a, b in pairs(losses, want_losses) if b.size and b.any()]
    entry, norm = [], []
    for ours, theirs in pairs(grads, want_grads):
        difference = ours.astype(np.float64) - theirs
        entry.append(np.abs(difference).max() / np.abs(theirs).max())
        norm.append(np.linalg.norm(difference) / np.linalg.norm(theirs))
    # `max` of Python drops what is not a number.
    return Errors(np.max(worst), np.max(entry), np.max(norm), np.abs(counts - want_counts).sum() // 2)


def pairs(ours, theirs):
    return zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)

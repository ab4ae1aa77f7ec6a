"""Training steps on any mesh of 8 devices from one state and text, in which no rounding changes a choice.

In bf16 and FP8 a device that has another part of the batch rounds sums otherwise. Where two experts' scores
are that close a token then goes to another expert, and gradients differ by whole terms: no error, but errors
hide behind it. So the text is of sequences whose scores, in float64, lie further apart than roundings move
them.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.config import (
    AttentionConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import Schedules, batch_sharding, make_train_step
from tests.model.translate import to_oracle
from tests.oracles import transformer
from tests.oracles.tree import float64

VOCAB, HOT = 16, 5
# What decides between experts, scores of 0 to 1, is this far apart: 8 unit roundoffs of bf16.
MARGIN = 0.03
RATES = Schedules(0.02, 0.25, 0.3)
LOADS = ("spread", "one expert takes everything")


class Size(NamedTuple):
    """Tokens of a step, and the experts they choose from."""

    batch: int
    seq: int
    experts: int

    @property
    def model(self):
        moe = MoEConfig(
            n_dense_layers=0, n_experts=self.experts, top_k=3, d_ff_expert=8, n_groups=4, topk_groups=2
        )
        attention = AttentionConfig(kind="mqa", n_heads=2, head_dim=4)
        return ModelConfig(
            vocab_size=VOCAB, d_model=16, n_layers=1, init_std=0.3, attention=attention, moe=moe
        )


MANY, FEW = (
    Size(16, 4, 16),
    Size(8, 2, 32),
)  # Of FEW not even half of the experts can have a token of their own.


class Case(NamedTuple):
    """A program."""

    data: int = 1
    expert: int = 1
    sharding: str = "replicated"
    micro: int = 1  # Micro-batches.
    precision: str = "fp32"
    size: Size = MANY

    def __str__(self):
        few = ", few tokens" if self.size == FEW else ""
        return f"{self.data} x {self.expert}, {self.sharding}, {self.micro} micro, {self.precision}{few}"

    @property
    def config(self):
        """Moments (of replicas the larger ones) are in host memory where all is split, nothing summed."""
        batch, seq, _ = self.size
        memory = "host" if self.sharding == "fsdp" and self.micro == 1 else "device"
        share = 0.7 if memory == "host" and self.data > 1 else 1.0
        return Config(
            model=self.size.model,
            # An eps near the gradients' size, so that a rounding does not become a whole step.
            optimizer=OptimizerConfig(eps=0.01, clip_norm=0.5, memory=memory, host_share=share),
            train=TrainConfig(
                precision=self.precision,
                remat="v3",
                seq_len=seq,
                batch_size=batch,
                micro_batch_size=batch // self.micro,
            ),
            mesh=MeshConfig(data=self.data, expert=self.expert, sharding=self.sharding),
        )


def every():
    """All that 8 devices can be split into, data x expert; and with few tokens all meshes and precisions."""
    found = []
    for precision in ("fp32", "bf16", "fp8"):
        for data in (8, 4, 2, 1):
            mesh = data, 8 // data
            for sharding in ("replicated", "zero1", "fsdp"):
                found += [Case(*mesh, sharding, micro, precision) for micro in (1, 2)]
            found.append(Case(*mesh, "fsdp", 1, precision, FEW))
    return found


@functools.cache
def start(size, load):
    """The state before the step, on the host."""
    config = Case(size=size).config
    rng = np.random.default_rng(1)

    def value(path, leaf):
        where = jax.tree_util.keystr(path)
        if "optimizer" in where:
            return np.zeros(leaf.shape, leaf.dtype)
        drawn = 0.3 * rng.standard_normal(leaf.shape) + ("scale" in where)
        if "bias" in where and load != "spread":
            drawn[..., HOT] = 9.0  # Scores are at most 1.
        return drawn.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, abstract_state(config, make_mesh(config.mesh)))


@functools.cache
def oracle(size, load):
    """The state as the oracles have it."""
    state = start(size, load)
    return float64(to_oracle(state.params, state.router, size.model))


def margins(size, load, tokens):
    """The least distance between what was chosen and what was not, experts and groups, in a sequence."""
    tree, model, moe = oracle(size, load), size.model, size.model.moe
    (routing,) = transformer.forward(tree, tokens, model).routing
    assert routing is not None  # The only layer has experts.
    biased = routing.scores + tree["layers"][0]["ffn"]["bias"]
    by_group = np.sort(biased.reshape(len(tokens), moe.n_groups, -1), -1)[..., -2:].sum(-1)
    groups = np.sort(by_group)[:, ::-1]
    allowed = np.repeat(by_group >= groups[:, [moe.topk_groups - 1]], moe.n_experts // moe.n_groups, 1)
    experts = np.sort(np.where(allowed, biased, -np.inf))[:, ::-1]
    last = [(groups, moe.topk_groups), (experts, moe.top_k)]
    return min((x[:, chosen - 1] - x[:, chosen]).min() for x, chosen in last)


@functools.cache
def text(size):
    """[batch, seq + 1] of tokens whose choices are clear under every load."""
    rng, rows = np.random.default_rng(2), []
    while len(rows) < size.batch:
        row = rng.integers(0, VOCAB, size.seq + 1).astype(np.int32)
        if all(margins(size, load, row[:-1]) > MARGIN for load in LOADS):
            rows.append(row)
    return np.stack(rows)


@functools.cache
def step(case):
    """By load: the state after a step and its metrics, on the host."""
    config = case.config
    mesh = make_mesh(config.mesh)
    abstract, run = abstract_state(config, mesh), make_train_step(config, mesh)
    batch, seq, _ = case.size
    rows = {
        "tokens": text(case.size)[:, :-1],
        "targets": text(case.size)[:, 1:],
        "positions": np.tile(np.arange(seq, dtype=np.int32), (batch, 1)),
        "segment_ids": np.ones((batch, seq), np.int32),
        "loss_mask": np.ones((batch, seq), bool),
    }
    shape = (case.micro, batch // case.micro, seq)
    put = {k: jax.device_put(x.reshape(shape), batch_sharding(mesh)) for k, x in rows.items()}

    def placed(leaf, shape):
        return jax.device_put(leaf, shape.sharding)

    found, rates = {}, Schedules(*map(np.float32, RATES))
    for load in LOADS:
        state = jax.tree.map(placed, start(case.size, load), abstract)
        found[load] = jax.device_get(run(state, put, np.int32(case.micro), rates))
    return found


def named(tree):
    """Float64 leaves by path."""
    return {
        jax.tree_util.keystr(path): np.float64(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def gradients(case, load):
    """Clipped, as the first moment that a first step leaves: times 1 - b1."""
    return named(step(case)[load][0].optimizer.mu)


def parameters(case, load):
    """After the step."""
    return named(step(case)[load][0].params)


def moves(case, load):
    """What the step moved each parameter by."""
    before = named(start(case.size, load).params)
    return {name: leaf - before[name] for name, leaf in parameters(case, load).items()}

"""HBM of a device at the peak of a training step, by kind, without compiling anything.

    state        parameters and moments, as the program lays them out
    gradients    float32 as the parameters; twice that when micro-batches are summed
    activations  what the forward pass keeps for the backward pass (traced: `residuals.kept_for_backward`)
    temporaries  the largest working set of a layer's backward pass, or of the loss, and the weights that are
                 gathered for it

The working sets are counted by hand below, from what the backward pass of a layer has at once. On TPUs an
array's last dimension takes whole tiles of 128.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.parallel.exchange import capacity
from dsv3_jax.parallel.transport import IN_USE, Wire, choose
from dsv3_jax.planning import flops
from dsv3_jax.planning.hardware import Topology
from dsv3_jax.planning.residuals import kept_for_backward, wide
from dsv3_jax.planning.shapes import Split, parts


class Memory(NamedTuple):
    """Bytes of a device."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    temporaries: float

    @property
    def total(self) -> float:
        """At the peak."""
        return sum(self)


class Rows(NamedTuple):
    """What the routed experts of a device work on in a layer."""

    slots: float  # Tokens in the buffers that arrive; the tokens here where experts are not spread.
    rows: float  # (Token, expert) pairs that are multiplied.
    sent: float  # Tokens that leave for other devices.
    far: float = 0.0  # Of these, to another node, where a token crosses to a node once.


def tokens_of(config: Config, split: Split) -> float:
    """Tokens of a micro-batch on a device."""
    micro = config.train.micro_batch_size or config.train.batch_size
    return micro * config.train.seq_len / (split.data * split.expert)


def expert_rows(config: Config, split: Split, platform: str) -> Rows:
    """Rows and buffers of the routed experts for a micro-batch with balanced routing."""
    moe, tokens = config.model.moe, tokens_of(config, split)
    if flops.layers(config.model)[1] == 0:
        return Rows(0, 0, 0)
    if split.expert == 1:
        return Rows(tokens, tokens * moe.top_k, 0)
    transport = choose(config.mesh.transport, platform)
    groups = (moe.n_groups, moe.topk_groups)

    def wire(slack: float):
        return Wire("expert", split.expert, transport, slack, config.mesh.expert_node)

    def room(slack: float):
        return capacity(int(tokens), moe.top_k, moe.n_experts, wire(slack), groups)

    buffers = room(config.mesh.dispatch_slack)
    # A dense exchange moves whole buffers, others what is in use.
    moved = room(1.0) if transport in IN_USE else buffers
    hops, ranks = wire(1.0).hops, split.expert
    if len(hops) == 1:
        return Rows(ranks * buffers.slots, ranks * buffers.copies, (ranks - 1) * moved.slots)
    nodes, node = hops[0].ranks, hops[1].ranks
    far, near = (nodes - 1) * moved.slots, (node - 1) * nodes * moved.within
    return Rows(nodes * buffers.slots + ranks * buffers.within, ranks * buffers.copies, far + near, far)


def in_nodes(config: Config, split: Split, topology: Topology) -> Config:
    """The configuration with the nodes that `expert` spans, as the devices would name them."""
    if config.mesh.expert_node or split.expert % topology.node:
        return config
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert_node=topology.node))


def of_step(config: Config, split: Split, platform: str, probe: bool = False) -> Memory:
    """The memory of a training step on one device of a mesh.

    With `probe` the activations are those of two expert ranks, if there are more: what a device keeps hardly
    depends on their number, and a search need not trace the model for every one.
    """
    held = parts(config, split)
    train = config.train
    micro = train.micro_batch_size or train.batch_size
    moment = jnp.dtype(config.optimizer.moment_dtype).itemsize
    parameters = 4.0 * sum(part.held for part in held.values())
    optimizer = 2.0 * moment * sum(part.moments for part in held.values())
    copies = 1 if micro == train.batch_size else 2
    sequences = micro / (split.data * split.expert)
    activations = _kept(config, split, platform, sequences, min(split.expert, 2) if probe else split.expert)
    attention, dense = _attention(config, split, platform), _dense(config, split, platform)
    gradients = copies * parameters
    backward = max(attention, dense, _experts(config, split, platform)) + _whole_tables(config, split)
    loss = _loss(config, split) - gradients / copies  # The layers' gradients are not there yet.
    return Memory(parameters, optimizer, gradients, activations, max(backward, loss))


def _kept(config: Config, split: Split, platform: str, sequences: float, expert: int) -> float:
    """Activations of the sequences here; copies of weights: experts whole, the rest as that is split."""
    kept, held = kept_for_backward(config, expert, platform), parts(config, split)
    experts = kept.experts / split.expert
    if split.sharding == "zero1" and split.data > 1:  # Gathered once a micro-batch, whatever the policy.
        width = 4 if config.train.precision == "fp8" else _bytes(config)
        experts = max(experts, width * held["experts"].whole)
    rest = [part for name, part in held.items() if name != "experts"]
    share = sum(part.held for part in rest) / sum(part.whole for part in rest)
    return sequences * kept.sequence + experts + share * kept.weights


def _bytes(config: Config) -> int:
    return 4 if config.train.precision == "fp32" else 2


def _weights(config: Config, elements: float) -> float:
    """A layer's weights, whole, in the compute dtype, and their gradients before they are split."""
    return 2 * elements * _bytes(config)


def _attention(config: Config, split: Split, platform: str) -> float:
    """Queries, keys, values and output, and the gradient of each; the hidden state in float32."""
    a, model = config.model.attention, config.model
    qk, v = flops.widths(a)
    elements = a.n_heads * (4 * wide(qk, platform) + 4 * wide(v, platform))
    weights = flops.forward(model, 1)
    a_layer = (weights.up_projections + 2.0 * a.n_heads * v * model.d_model) / 2 / sum(flops.layers(model))
    tokens = tokens_of(config, split)
    return tokens * (elements * _bytes(config) + 8 * model.d_model) + _weights(config, a_layer)


def _dense(config: Config, split: Split, platform: str) -> float:
    model, tokens = config.model, tokens_of(config, split)
    if flops.layers(model)[0] == 0:
        return 0.0
    elements = 5 * wide(model.d_ff, platform)
    weights = _weights(config, 3 * model.d_model * model.d_ff)
    return tokens * (elements * _bytes(config) + 8 * model.d_model) + weights


def _experts(config: Config, split: Split, platform: str) -> float:
    """Rows and the gradients of rows, SwiGLU's input and its gradient, its output; weights and gradients."""
    model, moe = config.model, config.model.moe
    found = expert_rows(config, split, platform)
    if not found.rows:
        return 0.0
    elements = found.rows * (2 * model.d_model + 5 * wide(moe.d_ff_expert, platform))
    if split.expert > 1:  # The buffers of what leaves and what arrives.
        elements += 2 * found.slots * model.d_model
    if platform == "tpu":  # The choices of each slot before they are summed; in tiles of 8 that is a copy.
        choices = found.slots * (moe.top_k + (-(-moe.top_k // 8) * 8 if moe.top_k % 8 else 0))
        elements = max(elements, (choices + found.rows) * model.d_model)
    weights = 3 * model.d_model * moe.d_ff_expert * moe.n_experts / split.expert
    if split.data == 1:
        return elements * _bytes(config) + _weights(config, weights)
    if split.sharding == "replicated":  # `shard_map` sums gradients as parameters are, in float32.
        return elements * _bytes(config) + _weights(config, weights) + 4 * weights
    # A matrix at a time is gathered, and its gradient scattered, in float32; gate and up are the larger one.
    return elements * _bytes(config) + 2 / 3 * weights * (_bytes(config) + 4)


def _whole_tables(config: Config, split: Split) -> float:
    """The embedding is gathered whole for the look-up, in float32; with MTP its gradient is there early."""
    if split.sharding != "fsdp" or split.n_devices == 1:
        return 0.0
    return config.model.vocab_size * config.model.d_model * (8.0 if config.model.mtp.depth else 4.0)


def _loss(config: Config, split: Split) -> float:
    """Logits in float32 of a chunk, their exponentials, and the gradient in the compute dtype."""
    train = config.train
    chunk = train.loss_chunk or train.seq_len
    logits = tokens_of(config, split) / train.seq_len * chunk * config.model.vocab_size
    return logits * (8 + _bytes(config))

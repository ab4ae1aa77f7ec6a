"""What a device sends in a training step, by collective, and the link that carries it.

A ring's all-gather or reduce-scatter over n devices sends (n-1)/n of the whole from each, an all-reduce twice
that. Between experts a token goes once to each node and once to each rank that holds one of its experts;
balanced routing is assumed.
"""

from typing import NamedTuple

from dsv3_jax.config import Config
from dsv3_jax.planning import flops
from dsv3_jax.planning.hardware import Topology
from dsv3_jax.planning.memory import expert_rows, in_nodes
from dsv3_jax.planning.shapes import Split, parts


class Transfer(NamedTuple):
    """What one collective sends from a device in a step."""

    what: str
    axis: str  # "data" or "expert".
    size: float  # Bytes.
    near: float  # Bytes over the near link (ICI, NVLink).
    far: float  # Bytes over the network between nodes.
    hops: float  # Links of a torus that a byte of an all-to-all takes, over those it could use at once.


def of_step(config: Config, split: Split, topology: Topology) -> list[Transfer]:
    """Every collective of a step, micro-batches and layers added up; those that move nothing are left out."""
    train = config.train
    n_micro = train.batch_size // (train.micro_batch_size or train.batch_size)
    state = [_over_links(*part, split, topology) for part in _state(config, split, n_micro) if part[2]]
    return state + _experts(in_nodes(config, split, topology), split, topology, n_micro)


def _state(config: Config, split: Split, n_micro: int) -> list[tuple[str, str, float]]:
    """Parameters and gradients, in the dtype in which they are multiplied; the experts' gradients in float32.

    In FP8 weights reach their kernels in float32.
    """
    by_part = parts(config, split)
    width = 2 if config.train.precision == "bf16" else 4
    experts = by_part["experts"].whole
    shared = sum(part.whole for part in by_part.values()) - experts  # Every rank of `expert` has a copy.
    data, expert = (split.data - 1) / split.data, (split.expert - 1) / split.expert
    split_over_data = split.sharding != "replicated"
    reduce = data * (4 * experts + width * shared) * n_micro
    rest = shared / split.data if split_over_data else shared
    name = "reduce-scatter gradients" if split_over_data else "all-reduce gradients"
    found = [
        (name, "data", reduce * (1 if split_over_data else 2)),
        ("all-reduce gradients", "expert", 2 * expert * rest * width * n_micro),
    ]
    if split.sharding == "fsdp":  # For the forward pass, and again for the backward pass.
        found.append(("all-gather parameters", "data", 2 * data * (experts + shared) * width * n_micro))
    if split.sharding == "zero1":  # Experts layer by layer, and kept; the rest when the step has updated it.
        gathered = experts * width * n_micro + shared * 4
        found.append(("all-gather parameters", "data", data * gathered))
    return found


def _experts(config: Config, split: Split, topology: Topology, n_micro: int) -> list[Transfer]:
    """Dispatch and combine, each forward and backward, and dispatch again for the backward pass."""
    rows = expert_rows(config, split, topology.chip.platform)
    if not rows.sent:
        return []
    sent = rows.sent * config.model.d_model * flops.layers(config.model)[1] * n_micro
    width = 4 if config.train.precision == "fp32" else 2
    forward = 1 if config.train.precision == "fp8" else width
    again = 0 if config.train.remat == "none" else 1
    sizes = {"dispatch": sent * forward * (2 + again), "combine": sent * width * 2}
    found = [_over_links(f"all-to-all {way}", "expert", size, split, topology) for way, size in sizes.items()]
    if not rows.far:
        return found
    far = rows.far / rows.sent
    return [t._replace(near=(1 - far) * t.size, far=far * t.size) for t in found]


def _over_links(what: str, axis: str, size: float, split: Split, topology: Topology) -> Transfer:
    """Ranks of `expert` are neighbours; those of `data` are `expert` devices apart."""
    n, stride = (split.expert, 1) if axis == "expert" else (split.data, split.expert)
    if topology.chip.torus:
        hops = _side(n, topology) / 4 if "all-to-all" in what else 1.0
        return Transfer(what, axis, size, size, 0.0, max(1.0, hops))
    together = max(1, min(n, topology.node // stride))  # Ranks of the axis inside one node.
    if together == n:
        return Transfer(what, axis, size, size, 0.0, 1.0)
    if "all-to-all" in what:
        far = size * (n - together) / (n - 1)
        return Transfer(what, axis, size, size - far, far, 1.0)
    # Each node sends its sum once, through the network cards of all its ranks together.
    nodes = n / together
    far = size / ((n - 1) / n) * ((nodes - 1) / nodes) / together
    return Transfer(what, axis, size, size if together > 1 else 0.0, far, 1.0)


def _side(n: int, topology: Topology) -> float:
    """Chips along the longest torus dimension that `n` neighbouring chips span."""
    side = 1
    for size in sorted(topology.shape):
        side = max(side, min(size, n))
        n = max(1, n // size)
    return side

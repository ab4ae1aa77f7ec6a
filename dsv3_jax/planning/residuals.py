"""What the forward pass leaves for the backward pass: the residuals of `jax.vjp` of the real loss.

Traced on devices that are names only; nothing is allocated. What depends on the tokens grows with a device's
sequences. Copies of weights in the dtype of computation, which some remat policies keep, do not.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from dsv3_jax.config import Config, MeshConfig
from dsv3_jax.model import forward, init_variables
from dsv3_jax.parallel.mesh import use_mesh
from dsv3_jax.planning.shapes import stand_in_mesh
from dsv3_jax.training.losses import losses
from dsv3_jax.training.state import make_model
from pallas_kernels import target_platform


class Kept(NamedTuple):
    """Bytes."""

    sequence: float  # Of one sequence, on the device that it is on.
    experts: float  # Copies of the routed experts' weights, of all ranks together.
    weights: float  # Copies of all other weights, whole.


def padded(shape: tuple[int, ...], platform: str) -> int:
    """Elements that an array takes: TPUs lay its last two dimensions out in tiles of 8 x 128."""
    if platform != "tpu" or len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-2]) * -(-shape[-2] // 8) * 8 * wide(shape[-1], platform)


def wide(width: int, platform: str) -> int:
    """`padded` of a last dimension alone."""
    return -(-width // 128) * 128 if platform == "tpu" else width


def kept_for_backward(config: Config, expert: int, platform: str) -> Kept:
    """What stays on a device, by what it grows with.

    They are the residuals of `jax.vjp` of the real loss, traced with a sequence a device: what the remat
    policy, the kernels of `platform` and the exchange between experts keep.
    """
    node = config.mesh.expert_node
    mesh = dataclasses.replace(
        MeshConfig(data=1, expert=expert, expert_node=node if node and expert % node == 0 else 1),
        # The same arrays are kept, whoever moves them; our kernel is not traced on every machine.
        transport="ragged" if config.mesh.transport == "remote" else config.mesh.transport,
        dispatch_slack=config.mesh.dispatch_slack,
    )
    train = dataclasses.replace(type(config.train)(), seq_len=config.train.seq_len)
    for name in ("precision", "remat", "loss_chunk"):
        train = dataclasses.replace(train, **{name: getattr(config.train, name)})
    data = dataclasses.replace(type(config.data)(), mask_documents=config.data.mask_documents)
    key = Config(model=config.model, data=data, train=train, fp8=config.fp8, mesh=mesh)
    logger = logging.getLogger("pallas_kernels")
    level, _ = logger.level, logger.setLevel(logging.WARNING)
    try:
        return _kept(key, expert, platform)
    finally:
        logger.setLevel(level)


@functools.lru_cache(maxsize=64)
def _kept(config: Config, expert: int, platform: str) -> Kept:
    residuals, params, devices = _trace(config, expert, platform)
    # Parameters are kept too, and counted elsewhere; so is the head's gradient, which has its shape.
    leaves = jax.tree_util.tree_leaves_with_path(params)
    parameters = {(leaf.shape, leaf.dtype) for _, leaf in leaves}
    copies = {shape: path for path, leaf in leaves for shape in _copies(path, leaf.shape)}
    arrays = [leaf for leaf in jax.tree.leaves(residuals) if jnp.issubdtype(leaf.dtype, jnp.number)]
    arrays = [leaf for leaf in arrays if (leaf.shape, leaf.dtype) not in parameters]
    if expert > 1:
        # Of rows that travelled, the trace keeps SwiGLU's input twice; the compiler merges equal arrays.
        twice = 2 * config.model.moe.d_ff_expert
        rows = {(x.shape, x.dtype): x for x in arrays if x.shape[-1:] == (twice,) and expert not in x.shape}
        arrays = [x for x in arrays if (x.shape, x.dtype) not in rows] + list(rows.values())
    found = Kept(0.0, 0.0, 0.0)
    for x in arrays:
        if x.shape in copies and jnp.issubdtype(x.dtype, jnp.floating):
            whose = "experts" if copies[x.shape][-2].key == "moe" else "weights"
            size = math.prod(x.shape)
        else:
            whose, size = "sequence", _laid_out(x.shape, config, platform) / devices
        found = found._replace(**{whose: getattr(found, whose) + size * x.dtype.itemsize})
    return found


def _copies(path: Any, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes that a copy of a weight may have: its own, one layer's, of `w_o` with heads and width as one."""
    for own in (shape, shape[1:]):
        if path[-1].key == "w_o" and len(own) > 2:
            yield (*own[:-3], own[-3] * own[-2], own[-1])
        elif len(own) > 1:
            yield own


def _laid_out(shape: tuple[int, ...], config: Config, platform: str) -> int:
    """Elements of an activation: kernels take rows as they are, XLA turns all else so that none is lost."""
    model, seq = config.model, config.train.seq_len
    attention = shape[-3:-1] == (model.attention.n_heads, seq)
    width = model.moe.d_ff_expert
    experts = len(shape) > 1 and shape[-1] in (width, 2 * width) and shape[-2] != seq  # Rows of choices.
    return padded(shape, platform) if attention or experts else math.prod(shape)


def _trace(config: Config, expert: int, platform: str) -> tuple[Any, Any, int]:
    """(residuals, parameters, devices), of a sequence a device."""
    model = make_model(config)
    seq, depth = config.train.seq_len, config.model.mtp.depth
    rng = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    variables = meta.unbox(jax.eval_shape(lambda key: init_variables(model, key), rng))
    # Two replicas at least: on several devices kernels run under `shard_map`, however many this machine has.
    data = 2 if expert == 1 else 1
    shape = (data * expert, seq)
    ids, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids) | {"loss_mask": mask}

    def kept(params, router, batch):
        def loss(params):
            segments = batch["segment_ids"] if config.data.mask_documents else None
            inputs = batch["tokens"], batch["positions"], segments, batch["targets"]
            outputs = forward(model, {"params": params, "router": router}, *inputs)
            ones = jnp.ones(depth + 1)
            return losses(outputs, batch, ones, 1.0, jnp.float32(0.3), config.train.loss_chunk).loss

        return jax.vjp(loss, params)[1]

    mesh = stand_in_mesh(data, expert, platform)
    with target_platform(platform), use_mesh(mesh, config.mesh):
        residuals = jax.eval_shape(kept, variables["params"], variables.get("router", {}), batch)
    return residuals, variables["params"], data * expert

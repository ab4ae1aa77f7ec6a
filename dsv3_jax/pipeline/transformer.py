"""The transformer in stages: its layers split as evenly as can be, for `runner.gradients`.

The layout is a view: `split` takes the parameters as the whole model has them, `merge` gives gradients back
in the same tree, so that optimizer and checkpoints do not know of stages.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dsv3_jax.config import FP8Config, ModelConfig
from dsv3_jax.model.attention import rope_dim
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.rope import rotation
from dsv3_jax.model.transformer import Block
from dsv3_jax.pipeline.runner import Parts, Result
from dsv3_jax.pipeline.schedules import ScheduleError, stage_sizes

Tree = Any
KINDS = ("dense_layers", "moe_layers")  # The two stacks of `model.Transformer`, in its order.


def split(config: ModelConfig, variables: Tree, n_stages: int) -> tuple[Tree, Tree]:
    """(stages, shared) of a model's variables, unboxed: {"params": ..., "router": ...}.

    Stages with fewer layers of a kind than the longest one has are padded; what pads is never computed.

    Raises:
      ScheduleError: fewer layers than stages, or the model has MTP blocks.
    """
    params, router = variables["params"], variables.get("router", {})
    stages = {}
    for kind, where in _layers(config, n_stages).items():
        stacks = {"params": params[kind], "router": router.get(kind, {})}
        stages[kind] = jax.tree.map(lambda leaf, where=where: leaf[np.maximum(where, 0)], stacks)
    return stages, {name: leaf for name, leaf in params.items() if name not in KINDS}


def merge(config: ModelConfig, result: Result, n_stages: int) -> tuple[Tree, jax.Array]:
    """(gradients as the model's parameters, counts [MoE layer, expert]) of what the runner returned."""
    grads = dict(result.shared)
    counts = jnp.zeros((0, config.moe.n_experts), jnp.int32)
    for kind, where in _layers(config, n_stages).items():
        real = np.flatnonzero(where.reshape(-1) >= 0)  # Stage by stage, so in the order of layers.
        whole = lambda leaf, real=real: leaf.reshape(-1, *leaf.shape[2:])[real]  # noqa: E731
        grads[kind] = jax.tree.map(whole, result.stages[kind]["params"])
        if kind == "moe_layers":
            counts = whole(result.aux)
    return grads, counts


def parts(
    config: ModelConfig,
    n_stages: int,
    loss: Callable[[jax.Array, jax.Array, Tree], jax.Array],
    balance_share: float,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    mask_documents: bool = False,
    recipe: FP8Config | None = None,
) -> Parts:
    """The functions of the runner for this model.

    Args:
      config: the model; without MTP.
      n_stages: of the schedule.
      loss: (hidden after the final norm, head [d, vocab], micro) -> its part of the step's loss.
      balance_share: a micro-batch's share of the step's sequences, which weighs its balance loss.
      dtype: of activations.
      mask_documents: attend within equal `segment_ids` only.
      recipe: of FP8 products.
    """
    layers = _layers(config, n_stages)

    def embed(shared: Tree, micro: Tree) -> jax.Array:
        return shared["embedding"][micro["tokens"]].astype(dtype)

    def body(stage: Tree, x: jax.Array, micro: Tree, index: jax.Array):
        turn = rotation(config.rope, rope_dim(config.attention), micro["positions"])
        segments = micro["segment_ids"] if mask_documents else None
        balance, counts = jnp.zeros((), jnp.float32), jnp.zeros((0, config.moe.n_experts), jnp.int32)
        for kind, where in layers.items():
            block = Block(config, kind == "moe_layers", recipe=recipe)

            def layer(x, operands, block=block):
                variables, real = operands

                def compute():
                    applied: Any = block.apply(variables, x, turn, segments)
                    y, report = applied
                    if report is None:
                        return y, jnp.zeros((), jnp.float32), jnp.zeros((config.moe.n_experts,), jnp.int32)
                    return y, report.balance_loss, report.counts

                skipped = jax.tree.map(
                    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute)
                )
                y, loss, count = lax.cond(real, compute, lambda: (x, *skipped[1:]))
                return y, (loss, count)

            x, (losses, counted) = lax.scan(layer, x, (stage[kind], jnp.asarray(where >= 0)[index]))
            if kind == "moe_layers":
                balance, counts = losses.sum() * balance_share, counted
        return x, balance, counts

    def head(shared: Tree, x: jax.Array, micro: Tree) -> jax.Array:
        norm: nn.Module = RMSNorm(config.norm_eps)
        hidden: Any = norm.apply({"params": shared["final_norm"]}, x)
        table = shared["embedding"].T if config.tie_embeddings else shared["head"]
        return loss(hidden, table, micro)

    return Parts(embed, body, head)


def _layers(config: ModelConfig, n_stages: int) -> dict[str, np.ndarray]:
    """[stage, place]: the layer's number in its stack, -1 where a place is empty; by stack."""
    if config.mtp.depth:
        raise ScheduleError(f"model.mtp.depth = {config.mtp.depth}: no stage holds MTP blocks; set it to 0")
    sizes = stage_sizes(config.n_layers, n_stages)
    ends = np.cumsum(sizes)
    dense = min(config.moe.n_dense_layers, config.n_layers)
    rows: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
    for end, size in zip(ends, sizes, strict=True):
        numbers = range(int(end) - size, int(end))
        rows["dense_layers"].append([number for number in numbers if number < dense])
        rows["moe_layers"].append([number - dense for number in numbers if number >= dense])
    tables = {}
    for kind, lists in rows.items():
        width = max(map(len, lists))
        if width:
            tables[kind] = np.array([row + [-1] * (width - len(row)) for row in lists])
    return tables

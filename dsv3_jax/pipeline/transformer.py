"""The transformer in stages: its layers split as evenly as can be, for `runner.run`.

The embedding belongs to the first stage; the final norm, the head and the multi-token prediction blocks,
which share embedding and head, to the last. Their parameters are on every rank, and used on those two.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dsv3_jax.model.attention import rope_dim
from dsv3_jax.model.layers import RMSNorm, weight
from dsv3_jax.model.rope import rotation
from dsv3_jax.model.transformer import REMAT, Block, Outputs, Transformer
from dsv3_jax.pipeline.runner import Parts
from dsv3_jax.pipeline.schedules import stage_sizes

Tree = Any
STACKS = ("dense_layers", "moe_layers")  # Of `model.Transformer`, in its order.


class HasLoss(Protocol):
    """What a loss function returns: its parts, with what is minimised as `loss`."""

    @property
    def loss(self) -> jax.Array: ...


def layers_by_stage(config: Any, n_stages: int) -> dict[str, np.ndarray]:
    """By stack, [stage, place]: the layer's number in its stack, -1 where a place is empty.

    Args:
      config: a `ModelConfig`.
      n_stages: of the schedule.

    Raises:
      ScheduleError: fewer layers than stages.
    """
    sizes = stage_sizes(config.n_layers, n_stages)
    ends = np.cumsum(sizes)
    dense = min(config.moe.n_dense_layers, config.n_layers)
    rows: dict[str, list[list[int]]] = {stack: [] for stack in STACKS}
    for end, size in zip(ends, sizes, strict=True):
        numbers = range(int(end) - size, int(end))
        rows["dense_layers"].append([number for number in numbers if number < dense])
        rows["moe_layers"].append([number - dense for number in numbers if number >= dense])
    tables = {}
    for stack, lists in rows.items():
        width = max(map(len, lists))
        if width:
            tables[stack] = np.array([row + [-1] * (width - len(row)) for row in lists])
    return tables


def parts(
    model: Transformer,
    n_stages: int,
    loss: Callable[[Outputs, Tree], HasLoss],
    balance_share: float,
    *,
    mask_documents: bool = False,
    unroll: bool = False,
) -> Parts:
    """The functions of the runner for this model.

    A stage's parameters are {stack: {"params": ..., "router": ...}} with a leading axis of places; `shared`
    is {"params": ..., "router": ...} of all else. What `body` counts is {"balance": [], "counts": [place,
    expert]}; what `head` counts, (what `loss` gives, counts [MTP depth, expert]).

    Args:
      model: with its precision and remat policy.
      n_stages: of the schedule.
      loss: (outputs after the last layer, micro) -> this micro-batch's part of the step's losses; of the
        outputs, `balance_loss` and `counts` are those of MTP alone.
      balance_share: of the step's sequences, the share of one micro-batch on one device: it weighs the
        balance loss.
      mask_documents: attend within equal `segment_ids` only.
      unroll: layers of a stage are not a loop, so that those of an overlapped forward and backward can run
        beside each other; the program grows with them.
    """
    config = model.config
    layers = layers_by_stage(config, n_stages)

    def embed(shared: Tree, micro: Tree) -> jax.Array:
        return shared["params"]["embedding"][micro["tokens"]].astype(model.dtype)

    def body(stage: Tree, x: jax.Array, micro: Tree, index: jax.Array):
        turn = rotation(config.rope, rope_dim(config.attention), micro["positions"])
        segments = micro["segment_ids"] if mask_documents else None
        balance, counts = jnp.zeros((), jnp.float32), jnp.zeros((0, config.moe.n_experts), jnp.int32)
        for stack, where in layers.items():
            layer = _layer(model, stack == "moe_layers", turn, segments, full=bool((where >= 0).all()))
            operands = stage[stack], jnp.asarray(where >= 0)[index]
            x, (losses, counted) = lax.scan(layer, x, operands, unroll=where.shape[1] if unroll else 1)
            if stack == "moe_layers":
                balance, counts = losses.sum() * balance_share, counted
        return x, balance, {"balance": balance, "counts": counts}

    ends = _Ends(config, model.dtype, model.remat, model.recipe)

    def head(shared: Tree, x: jax.Array, micro: Tree):
        segments = micro["segment_ids"] if mask_documents else None
        outputs: Any = ends.apply(shared, x, micro["targets"], micro["positions"], segments)
        parts = loss(outputs, micro)
        return parts.loss, (parts, outputs.counts)

    return Parts(embed, body, head)


def _layer(model: Transformer, moe: bool, turn: Any, segments: Any, full: bool) -> Callable:
    """(x, (variables, real)) -> x, (balance loss, counts) of one layer; `full`: all places hold a layer."""
    kind: Any = Block if model.remat == "none" else nn.remat(Block, policy=REMAT[model.remat])
    block = kind(model.config, moe, recipe=model.recipe)
    none = jnp.zeros((), jnp.float32), jnp.zeros((model.config.moe.n_experts,), jnp.int32)

    def layer(x: jax.Array, operands: tuple[Tree, jax.Array]):
        variables, real = operands

        def compute():
            y, report = block.apply(variables, x, turn, segments)
            return y, (none if report is None else (report.balance_loss, report.counts))

        return compute() if full else lax.cond(real, compute, lambda: (x, none))

    return layer


class _Ends(Transformer):
    """The model after its layers: final norm, head and multi-token prediction, with the names it gives."""

    @nn.compact
    def __call__(self, x, targets, positions, segment_ids):  # pyright: ignore[reportIncompatibleMethodOverride]
        config = self.config
        shape, std = (config.vocab_size, config.d_model), config.init_std
        embedding = weight(self, "embedding", shape, ("vocab", "embed"), std)
        head = embedding.T
        if not config.tie_embeddings:
            head = weight(self, "head", shape[::-1], ("embed", "vocab"), std)
        turn = rotation(config.rope, rope_dim(config.attention), positions)
        hidden = RMSNorm(config.norm_eps, name="final_norm")(x)
        later, reports = self._mtp(hidden, targets, embedding, turn, segment_ids)
        counts = [jnp.zeros((0, config.moe.n_experts), jnp.int32), *(r.counts[None] for r in reports)]
        balance = sum((r.balance_loss for r in reports), jnp.zeros((), jnp.float32))
        return Outputs(hidden, tuple(later), head, jnp.concatenate(counts), balance)

"""Runs any table: loss and gradients of a model in stages, inside `shard_map` over the pipeline's axis.

One loop over ticks. In each, a rank does the kind of cell that is its own, on what lies in its slots, and
values travel by `ppermute` to the slots of other ranks. The table is what the loop runs over: the program
does not grow with it. The backward of a stage is one vjp for B; I and W are two, for the input and for the
weights. Each computes the stage's forward again from its input, so a slot holds an input and no more.

Every axis of the mesh is split by hand: the functions of a model see one device's part of a micro-batch, and
may communicate over other axes, as all ranks that differ in them alone are at the same cell.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.pipeline.program import Channel, Route, numbered, routes_of
from dsv3_jax.pipeline.table import Table

Tree = Any


class Parts(NamedTuple):
    """A model in stages; `micro` is one micro-batch, `x` an activation, of the same shape everywhere.

    The loss of a step is the sum of what `body` and `head` give, over stages, micro-batches and devices:
    weigh them. Their last outputs are what else is summed, such as the load of experts.
    """

    # (shared, micro) -> x, before the first stage.
    embed: Callable[[Tree, Tree], jax.Array]
    # (stage's parameters, x, micro, stage's number) -> x, loss, aux.
    body: Callable[[Tree, jax.Array, Tree, jax.Array], tuple[jax.Array, jax.Array, Tree]]
    # (shared, x, micro) -> loss, aux; after the last stage.
    head: Callable[[Tree, jax.Array, Tree], tuple[jax.Array, Tree]]


class Sums(NamedTuple):
    """What one device has summed over its cells; gradients are float32, or of a wider type that is given."""

    loss: jax.Array  # []
    chunks: Tree  # Gradients, [chunk, ...] as the parameters.
    shared: Tree
    body: Tree  # [chunk, ...]: `body`'s third output; each is counted once, at its forward.
    head: Tree


class Result(NamedTuple):
    """Of one step; gradients are float32."""

    loss: jax.Array  # []
    stages: Tree  # Gradients, [stage, ...] as the parameters.
    shared: Tree
    body: Tree  # [stage, ...]
    head: Tree


def gradients(
    table: Table, mesh: Mesh, parts: Parts, stages: Tree, shared: Tree, batch: Tree, axis: str = "pipe"
) -> Result:
    """Loss and gradients of a step.

    Args:
      table: what every rank does, from `place`.
      mesh: has an axis `axis` as long as the table has ranks. The batch is split over all others.
      parts: the model's functions.
      stages: parameters, arrays [stage, ...].
      shared: parameters of `embed` and `head`, on every rank.
      batch: arrays [micro-batch, sequences, ...].
      axis: the mesh's axis of the pipeline.

    Raises:
      ValueError: mesh, parameters or batch do not fit the table.
    """
    schedule = table.schedule
    _fits("mesh axis " + axis, mesh.shape.get(axis), schedule.n_ranks)
    for leaf in jax.tree.leaves(stages):
        _fits("leading axis of stages", leaf.shape[0] if leaf.ndim else None, schedule.n_stages)
    held = np.array([schedule.stages_of(rank) for rank in range(schedule.n_ranks)])
    others = tuple(name for name in mesh.axis_names if name != axis)

    def on_device(chunks: Tree, shared: Tree, batch: Tree):
        own = run(table, parts, jax.tree.map(lambda leaf: leaf[0], chunks), shared, batch, axis)
        whole = lax.psum((own.loss, own.shared, own.head), mesh.axis_names)
        split = (own.chunks, own.body)
        if others:
            split = lax.psum(split, others)
        return *whole, *jax.tree.map(lambda leaf: leaf[None], split)

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(axis), P(), P(None, others)),
        out_specs=(P(), P(), P(), P(axis), P(axis)),
        check_vma=False,
    )
    local = jax.tree.map(lambda leaf: leaf[held], stages)
    loss, shared_grads, head, stage_grads, body = mapped(local, shared, batch)

    def by_stage(leaf: jax.Array) -> jax.Array:
        # DualPipe holds a stage on two ranks, which this sums.
        return jnp.zeros((schedule.n_stages, *leaf.shape[2:]), leaf.dtype).at[held].add(leaf)

    return Result(loss, jax.tree.map(by_stage, stage_grads), shared_grads, jax.tree.map(by_stage, body), head)


def run(table: Table, parts: Parts, chunks: Tree, shared: Tree, batch: Tree, axis: str = "pipe") -> Sums:
    """The step of one device, to be called inside `shard_map`; nothing is summed over devices.

    Args:
      table: what every rank does.
      parts: the model's functions.
      chunks: parameters of the stages that this rank holds, [chunk, ...], in the order of `stages_of`.
      shared: parameters of `embed` and `head`.
      batch: this device's part, [micro-batch, ...].
      axis: the pipeline's.

    Raises:
      ValueError: the batch does not fit the table.
    """
    schedule = table.schedule
    for leaf in jax.tree.leaves(batch):
        _fits("leading axis of batch", leaf.shape[0] if leaf.ndim else None, schedule.n_microbatches)
    cells, columns, channels = numbered(table)
    routes, pattern = routes_of(table, channels)
    n_slots = {kind: max(sizes) for kind, sizes in table.n_slots.items()}
    rank = lax.axis_index(axis)
    rows = {name: jnp.asarray(column)[:, rank] for name, column in columns.items()}
    rows["route"] = jnp.asarray(pattern)
    own = Rank(parts, schedule.n_stages, chunks, shared, batch)

    def tick(state: _State, row: Tree):
        nothing = jnp.zeros(state.inputs.shape[1:], state.inputs.dtype)
        made = state, nothing, nothing
        for number, kinds in enumerate(cells):
            # A loop of one turn or none, and no `lax.switch`: XLA copies what passes through a conditional,
            # here the sums of all gradients, and updates what a loop carries in place.
            turns = (row["kind"] == number).astype(jnp.int32)
            with jax.named_scope("cell_" + kinds):  # Profiles are read by these names.
                made = lax.fori_loop(0, turns, own.cell(kinds, row), made)
        state, activation, gradient = made
        sent = {"input": activation, "gradient": gradient}
        # Only ranks that have something for each other meet in a tick; no other waits.
        with jax.named_scope("send"):
            arrived = lax.switch(row["route"], [_travel(route, channels, axis) for route in routes], sent)
        slots = {"input": state.inputs, "gradient": state.gradients}
        for (kind, hop), value in zip(channels, arrived, strict=True):
            slots[kind] = slots[kind].at[row[f"{kind}{hop}"]].set(value)
        return state._replace(inputs=slots["input"], gradients=slots["gradient"]), None

    end, _ = lax.scan(tick, own.start(n_slots), rows)
    return Sums(end.loss, end.chunk_grads, end.shared_grads, end.body, end.head)


def _fits(what: str, size: int | None, wanted: int) -> None:
    if size != wanted:
        raise ValueError(f"{what} is {size}: the table has {wanted}")


class _State(NamedTuple):
    inputs: jax.Array  # [slot, ...]; the last slot takes what nobody waits for.
    gradients: jax.Array
    loss: jax.Array
    chunk_grads: Tree  # [chunk, ...]
    shared_grads: Tree
    body: Tree  # [chunk, ...]
    head: Tree


Made = tuple[_State, jax.Array, jax.Array]  # With the activation and the gradient that a tick sends.


class Rank:
    """The computations of one rank; stages, chunks and micro-batches are traced numbers."""

    def __init__(self, parts: Parts, n_stages: int, chunks: Tree, shared: Tree, batch: Tree):
        self._parts, self._last = parts, n_stages - 1
        self._chunks, self._shared, self._batch = chunks, shared, batch

    def start(self, n_slots: dict[str, int]) -> _State:
        micro, chunk = _pick(self._batch, 0), _pick(self._chunks, 0)
        x = jax.eval_shape(self._parts.embed, self._shared, micro)
        _, _, body = jax.eval_shape(self._parts.body, chunk, x, micro, jnp.int32(0))
        loss, head = jax.eval_shape(self._parts.head, self._shared, x, micro)
        n_chunks = jax.tree.leaves(self._chunks)[0].shape[0]
        # Not a number until written, so that a read before a write would show.
        empty = {kind: jnp.full((size + 1, *x.shape), jnp.nan, x.dtype) for kind, size in n_slots.items()}

        def wide(tree: Tree) -> Tree:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)

        return _State(
            inputs=empty["input"],
            gradients=empty["gradient"],
            loss=wide(loss),
            chunk_grads=wide(self._chunks),
            shared_grads=wide(self._shared),
            body=jax.tree.map(lambda leaf: jnp.zeros((n_chunks, *leaf.shape), leaf.dtype), body),
            head=_zeros(head),
        )

    def cell(self, kinds: str, row: Tree) -> Callable[[jax.Array, Made], Made]:
        """The work of cells of these kinds, as the body of a loop."""

        def run(turn: jax.Array, made: Made) -> Made:
            state, activation, gradient = made
            # Whatever reads the row stays in this loop, which mostly has no turn.
            row_now, _ = lax.optimization_barrier((row, turn))
            # Both halves of an overlapped cell read the state before it; nothing orders one after the other.
            before = state
            for kind in kinds:
                if kind == "F":
                    with jax.named_scope("forward"):
                        state, activation = self._forward(before, state, row_now)
                else:
                    with jax.named_scope(
                        {"B": "backward", "I": "backward_input", "W": "backward_weights"}[kind]
                    ):
                        state, gradient = self._backward(kind, before, state, row_now)
            return state, activation, gradient

        return run

    def _stage(self, stage: jax.Array, chunk: Tree, shared: Tree, x: jax.Array, micro: Tree):
        """(y, loss, body's aux, head's aux)."""
        parts = self._parts
        x = lax.cond(stage == 0, lambda: parts.embed(shared, micro), lambda: x)
        y, loss, body = parts.body(chunk, x, micro, stage)

        def head():
            return parts.head(shared, y, micro)

        last, aux = lax.cond(stage == self._last, head, lambda: _zeros(jax.eval_shape(head)))
        return y, loss + last, body, aux

    def _forward(self, before: _State, state: _State, row: Tree):
        micro = _pick(self._batch, row["f_micro"])
        chunk = _pick(self._chunks, row["f_chunk"])
        x = before.inputs[row["f_input"]]
        y, loss, body, head = self._stage(row["f_stage"], chunk, self._shared, x, micro)
        return state._replace(
            loss=state.loss + loss,
            body=jax.tree.map(lambda sums, new: sums.at[row["f_chunk"]].add(new), state.body, body),
            head=jax.tree.map(jnp.add, state.head, head),
        ), y

    def _backward(self, kind: str, before: _State, state: _State, row: Tree):
        stage, micro = row["b_stage"], _pick(self._batch, row["b_micro"])
        chunk, x = _pick(self._chunks, row["b_chunk"]), before.inputs[row["b_input"]]
        # The last stage's output feeds the loss alone.
        dy = jnp.where(stage == self._last, 0, before.gradients[row["b_gradient"]])
        found = self._vjp(kind, stage, chunk, x, micro)((dy, jnp.ones_like(state.loss)))
        if kind == "I":
            return state, found[0]
        d_chunk, d_shared, dx = found if kind == "B" else (*found, jnp.zeros_like(x))
        chunk_grads = jax.tree.map(
            lambda sums, new: sums.at[row["b_chunk"]].add(new), state.chunk_grads, d_chunk
        )
        shared_grads = jax.tree.map(jnp.add, state.shared_grads, d_shared)
        return state._replace(chunk_grads=chunk_grads, shared_grads=shared_grads), dx

    def _vjp(self, kind: str, stage: jax.Array, chunk: Tree, x: jax.Array, micro: Tree):
        """The backward of a stage: (dy, d loss) -> the gradients of B, I or W."""

        def outputs(chunk: Tree, shared: Tree, x: jax.Array):
            y, loss, *_ = self._stage(stage, chunk, shared, x, micro)
            return y, loss

        if kind == "I":
            return jax.vjp(lambda x: outputs(chunk, self._shared, x), x)[1]
        if kind == "W":
            return jax.vjp(lambda chunk, shared: outputs(chunk, shared, x), chunk, self._shared)[1]
        return jax.vjp(outputs, chunk, self._shared, x)[1]

    def residuals(self, kind: str, stage: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """An activation, and what the forward pass inside a backward keeps for its other half."""
        micro, chunk = _pick(self._batch, 0), _pick(self._chunks, 0)
        x = _zeros(jax.eval_shape(self._parts.embed, self._shared, micro))
        return x, jax.tree.leaves(self._vjp(kind, stage, chunk, x, micro))


def _zeros(shapes: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _pick(tree: Tree, index: Any) -> Tree:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def _travel(route: Route, channels: list[Channel], axis: str) -> Callable[[dict[str, jax.Array]], list]:
    def travel(sent: dict[str, jax.Array]) -> list[jax.Array]:
        def on(kind: str, hop: int, pairs: tuple[tuple[int, int], ...]) -> jax.Array:
            if not hop:
                return sent[kind]
            return lax.ppermute(sent[kind], axis, pairs) if pairs else jnp.zeros_like(sent[kind])

        return [on(*channel, pairs) for channel, pairs in zip(channels, route, strict=True)]

    return travel

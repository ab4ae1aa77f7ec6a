"""Runs any table: loss and gradients of a model in stages, under `shard_map` over one axis of the mesh.

One loop over ticks. In each, a rank switches to the kind of its cell, works on what lies in its slots, and
values travel by `ppermute` to the next ranks' slots. The table is what the loop runs over: the program
does not grow with it. The backward of a stage is one vjp for B; I and W are two, for the input and for the
weights. Each computes the stage's forward again from its input, so a slot holds an input and no more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.pipeline.schedules import Op, Schedule
from dsv3_jax.pipeline.table import Table, made_by, read_by

Tree = Any


class Parts(NamedTuple):
    """A model in stages; `micro` is one micro-batch, `x` an activation, of the same shape everywhere.

    The loss of a step is the sum of what `body` and `head` give, over stages and micro-batches: weigh them.
    """

    # (shared, micro) -> x, before the first stage.
    embed: Callable[[Tree, Tree], jax.Array]
    # (stage's parameters, x, micro, stage's number) -> x, loss, aux.
    body: Callable[[Tree, jax.Array, Tree, jax.Array], tuple[jax.Array, jax.Array, Tree]]
    # (shared, x, micro) -> loss, after the last stage.
    head: Callable[[Tree, jax.Array, Tree], jax.Array]


class Result(NamedTuple):
    """Of one step; gradients are float32."""

    loss: jax.Array  # []
    stages: Tree  # Gradients, [stage, ...] as the parameters.
    shared: Tree
    aux: Tree  # [stage, ...]: `body`'s third output, summed over micro-batches; each is counted once.


def gradients(
    table: Table, mesh: Mesh, parts: Parts, stages: Tree, shared: Tree, batch: Tree, axis: str = "pipe"
) -> Result:
    """Loss and gradients of a step.

    Args:
      table: what every rank does, from `place`.
      mesh: has an axis `axis` as long as the table has ranks. Other axes are left to the partitioner.
      parts: the model's functions.
      stages: parameters, arrays [stage, ...].
      shared: parameters of `embed` and `head`, on every rank.
      batch: arrays [micro-batch, ...].
      axis: the mesh's axis of the pipeline.

    Raises:
      ValueError: mesh, parameters or batch do not fit the table.
    """
    schedule = table.schedule
    _fits("mesh axis " + axis, mesh.shape.get(axis), schedule.n_ranks)
    for what, tree, size in (
        ("stages", stages, schedule.n_stages),
        ("batch", batch, schedule.n_microbatches),
    ):
        for leaf in jax.tree.leaves(tree):
            _fits(f"leading axis of {what}", leaf.shape[0] if leaf.ndim else None, size)
    held = np.array([schedule.stages_of(rank) for rank in range(schedule.n_ranks)])
    branches, program, hops = _program(table)
    n_slots = {kind: max(sizes) for kind, sizes in table.n_slots.items()}

    def on_rank(chunks: Tree, shared: Tree, batch: Tree, program: Tree):
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731  Of the split axis: one is left.
        runner = _Rank(parts, schedule.n_stages, first(chunks), shared, batch)
        start = runner.start(n_slots)

        def tick(state: _State, row: Tree):
            row = jax.tree.map(lambda column: column[0], row)
            made: tuple[_State, jax.Array, jax.Array] = lax.switch(
                row["branch"], [runner.cell(kinds, row) for kinds in branches], state
            )
            state, activation, gradient = made
            slots = {"input": state.inputs, "gradient": state.gradients}
            sent = {"input": activation, "gradient": gradient}
            for kind, hop in hops:
                value = sent[kind]
                if hop:
                    pairs = [(rank, (rank + hop) % schedule.n_ranks) for rank in range(schedule.n_ranks)]
                    value = lax.ppermute(value, axis, pairs)
                slots[kind] = slots[kind].at[row[f"{kind}{hop}"]].set(value)
            return state._replace(inputs=slots["input"], gradients=slots["gradient"]), None

        end, _ = lax.scan(tick, start, program)
        whole = lax.psum((end.loss, end.shared_grads), axis)
        split = jax.tree.map(lambda leaf: leaf[None], (end.stage_grads, end.aux))
        return *whole, *split

    mapped = jax.shard_map(
        on_rank,
        mesh=mesh,
        in_specs=(P(axis), P(), P(), P(None, axis)),
        out_specs=(P(), P(), P(axis), P(axis)),
        axis_names={axis},
        check_vma=False,
    )
    local = jax.tree.map(lambda leaf: leaf[held], stages)
    loss, shared_grads, stage_grads, aux = mapped(local, shared, batch, program)

    def by_stage(leaf: jax.Array) -> jax.Array:
        # DualPipe holds a stage on two ranks, which this sums.
        return jnp.zeros((schedule.n_stages, *leaf.shape[2:]), leaf.dtype).at[held].add(leaf)

    return Result(loss, jax.tree.map(by_stage, stage_grads), shared_grads, jax.tree.map(by_stage, aux))


def _fits(what: str, size: int | None, wanted: int) -> None:
    if size != wanted:
        raise ValueError(f"{what} is {size}: the table has {wanted}")


class _State(NamedTuple):
    inputs: jax.Array  # [slot, ...]; the last slot takes what nobody waits for.
    gradients: jax.Array
    loss: jax.Array
    stage_grads: Tree  # [chunk, ...]
    shared_grads: Tree
    aux: Tree  # [chunk, ...]


class _Rank:
    """The computations of one rank; all indices are traced."""

    def __init__(self, parts: Parts, n_stages: int, chunks: Tree, shared: Tree, batch: Tree):
        self._parts, self._last = parts, n_stages - 1
        self._chunks, self._shared, self._batch = chunks, shared, batch

    def start(self, n_slots: dict[str, int]) -> _State:
        micro, chunk = _pick(self._batch, 0), _pick(self._chunks, 0)
        x = jax.eval_shape(self._parts.embed, self._shared, micro)
        _, _, aux = jax.eval_shape(self._parts.body, chunk, x, micro, jnp.int32(0))
        n_chunks = jax.tree.leaves(self._chunks)[0].shape[0]
        # Not a number until written, so that a read before a write would show.
        empty = {kind: jnp.full((size + 1, *x.shape), jnp.nan, x.dtype) for kind, size in n_slots.items()}
        zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)  # noqa: E731
        total = jax.tree.map(lambda leaf: jnp.zeros((n_chunks, *leaf.shape), leaf.dtype), aux)
        loss = jnp.zeros((), jnp.float32)
        return _State(
            empty["input"], empty["gradient"], loss, zeros(self._chunks), zeros(self._shared), total
        )

    def cell(self, kinds: str, row: Tree) -> Callable[[_State], tuple[_State, jax.Array, jax.Array]]:
        """The branch of cells of these kinds: state -> state, activation to send, gradient to send."""

        def run(state: _State):
            activation = gradient = jnp.zeros(state.inputs.shape[1:], state.inputs.dtype)
            # Both halves of an overlapped cell read the state before it; nothing orders one after the other.
            before = state
            for kind in kinds:
                if kind == "F":
                    with jax.named_scope("forward"):
                        state, activation = self._forward(before, state, row)
                else:
                    with jax.named_scope(
                        {"B": "backward", "I": "backward_input", "W": "backward_weights"}[kind]
                    ):
                        state, gradient = self._backward(kind, before, state, row)
            return state, activation, gradient

        return run

    def _stage(self, stage: jax.Array, chunk: Tree, shared: Tree, x: jax.Array, micro: Tree):
        x = lax.cond(stage == 0, lambda: self._parts.embed(shared, micro), lambda: x)
        y, loss, aux = self._parts.body(chunk, x, micro, stage)
        loss += lax.cond(
            stage == self._last, lambda: self._parts.head(shared, y, micro), lambda: jnp.zeros(())
        )
        return y, loss, aux

    def _forward(self, before: _State, state: _State, row: Tree):
        micro = _pick(self._batch, row["f_micro"])
        chunk = _pick(self._chunks, row["f_chunk"])
        y, loss, aux = self._stage(row["f_stage"], chunk, self._shared, before.inputs[row["f_input"]], micro)
        total = jax.tree.map(lambda sums, new: sums.at[row["f_chunk"]].add(new), state.aux, aux)
        return state._replace(loss=state.loss + loss, aux=total), y

    def _backward(self, kind: str, before: _State, state: _State, row: Tree):
        stage, micro = row["b_stage"], _pick(self._batch, row["b_micro"])
        chunk, x = _pick(self._chunks, row["b_chunk"]), before.inputs[row["b_input"]]
        # The last stage's output feeds the loss alone.
        dy = jnp.where(stage == self._last, 0, before.gradients[row["b_gradient"]])

        def outputs(chunk: Tree, shared: Tree, x: jax.Array):
            y, loss, _ = self._stage(stage, chunk, shared, x, micro)
            return y, loss

        one = jnp.ones((), jnp.float32)
        if kind == "I":
            _, back = jax.vjp(lambda x: outputs(chunk, self._shared, x), x)
            return state, back((dy, one))[0]
        dx = jnp.zeros_like(x)
        if kind == "W":
            _, back = jax.vjp(lambda chunk, shared: outputs(chunk, shared, x), chunk, self._shared)
            d_chunk, d_shared = back((dy, one))
        else:
            _, back = jax.vjp(outputs, chunk, self._shared, x)
            d_chunk, d_shared, dx = back((dy, one))
        stage_grads = jax.tree.map(
            lambda sums, new: sums.at[row["b_chunk"]].add(new), state.stage_grads, d_chunk
        )
        shared_grads = jax.tree.map(jnp.add, state.shared_grads, d_shared)
        return state._replace(stage_grads=stage_grads, shared_grads=shared_grads), dx


def _pick(tree: Tree, index: Any) -> Tree:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def _program(table: Table) -> tuple[list[str], dict[str, np.ndarray], list[tuple[str, int]]]:
    """The table as numbers.

    Returns:
      the kinds of cells, one a branch; int32 arrays [tick, rank] by name: the branch, where the operands of
      its forward (f_...) and backward (b_...) are, and in which slot each value arrives; the ways that values
      take, as (kind, ranks onward), 0 for a rank's own next chunk.
    """
    schedule = table.schedule
    shape = len(table.ticks), schedule.n_ranks
    chunk_of = [{stage: c for c, stage in enumerate(schedule.stages_of(r))} for r in range(schedule.n_ranks)]
    branches = sorted({_kinds(cell) for row in table.ticks for cell in row})
    spare = {kind: max(sizes) for kind, sizes in table.n_slots.items()}
    names = ["branch", *(f"{half}_{what}" for half in "fb" for what in ("stage", "chunk", "micro"))]
    program = {name: np.zeros(shape, np.int32) for name in names}
    program |= {name: np.full(shape, spare["input"], np.int32) for name in ("f_input", "b_input")}
    program["b_gradient"] = np.full(shape, spare["gradient"], np.int32)
    hops = set()
    for tick, row in enumerate(table.ticks):
        for rank, cell in enumerate(row):
            program["branch"][tick, rank] = branches.index(_kinds(cell))
            for op in cell:
                half = "f" if op.kind == "F" else "b"
                program[f"{half}_stage"][tick, rank] = op.stage
                program[f"{half}_chunk"][tick, rank] = chunk_of[rank][op.stage]
                program[f"{half}_micro"][tick, rank] = op.microbatch
                for value in read_by(op, schedule.n_stages):
                    program[f"{half}_{value.kind}"][tick, rank] = table.slots[value]
                arrival = _arrival(schedule, rank, op)
                if arrival is not None:
                    value, target, hop = arrival
                    hops.add((value.kind, hop))
                    empty = np.full(shape, spare[value.kind], np.int32)
                    program.setdefault(f"{value.kind}{hop}", empty)[tick, target] = table.slots[value]
    return branches, program, sorted(hops)


def _kinds(cell: tuple[Op, ...]) -> str:
    return "".join(op.kind for op in cell)


def _arrival(schedule: Schedule, rank: int, op: Op):
    value = made_by(op, schedule.n_stages)
    if value is None:
        return None
    target = schedule.rank_of(value.stage, value.microbatch)
    return value, target, (target - rank) % schedule.n_ranks

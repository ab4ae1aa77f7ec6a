"""A schedule on ticks: what every rank computes, sends and keeps, tick by tick.

In a tick each rank works off at most one cell; then values travel. What a tick makes can be read from the
next tick on. A rank keeps, in numbered slots, the inputs of its stages until their last backward, and the
gradients of their outputs until the same. The first stage reads tokens and the last makes its own gradient
from the loss, so neither takes a slot for them.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.pipeline.cells import Cell, Op, Schedule, ScheduleError


class Value(NamedTuple):
    """What travels between stages, named by the stage that reads it."""

    kind: str  # "input" of the stage, or "gradient" of its output.
    stage: int
    microbatch: int


class Send(NamedTuple):
    """A value that leaves the rank that made it at the end of a tick."""

    tick: int
    source: int
    target: int
    value: Value


@dataclass(frozen=True)
class Table:
    """A schedule placed on ticks."""

    schedule: Schedule
    ticks: tuple[tuple[Cell, ...], ...]  # [tick][rank]; () is idle.
    sends: tuple[Send, ...]  # In the order of ticks; values for another stage of the same rank do not travel.
    slots: Mapping[Value, int]  # Where the reading rank keeps a value; inputs and gradients apart.
    n_slots: Mapping[str, tuple[int, ...]]  # ["input" or "gradient"][rank]: how many slots there are.


def place(schedule: Schedule) -> Table:
    """Puts every cell on the first tick that can have it, and every value into a free slot.

    Raises:
      ScheduleError: the ranks wait for each other.
    """
    tick_of = _first_ticks(schedule)
    n_ticks = 1 + max(tick_of.values())
    ticks: list[list[Cell]] = [[()] * schedule.n_ranks for _ in range(n_ticks)]
    for rank, cells in enumerate(schedule.cells):
        for cell in cells:
            ticks[tick_of[cell[0]]][rank] = cell
    sends, written = [], {}
    for op, tick in tick_of.items():
        value = made_by(op, schedule.n_stages)
        if value is None:
            continue
        written[value] = tick
        source = schedule.rank_of(op.stage, op.microbatch)
        target = schedule.rank_of(value.stage, value.microbatch)
        if source != target:
            sends.append(Send(tick, source, target, value))
    last_read: dict[Value, int] = {}
    for op, tick in tick_of.items():
        for value in read_by(op, schedule.n_stages):
            last_read[value] = max(tick, last_read.get(value, tick))
    slots, n_slots = _allocate(schedule, written, last_read)
    return Table(schedule, tuple(map(tuple, ticks)), tuple(sorted(sends)), slots, n_slots)


def waits_for(op: Op, n_stages: int) -> list[tuple[str, int, int]]:
    """(kind, stage, microbatch) of the operations that must be done before; a B counts as an I."""
    _, stage, m = op
    if op.kind == "F":
        return [("F", stage - 1, m)] if stage else []
    if op.kind == "W":
        return [("I", stage, m)]
    return [("F", stage, m)] + ([("I", stage + 1, m)] if stage < n_stages - 1 else [])


def made_by(op: Op, n_stages: int) -> Value | None:
    """The value that an operation makes for another stage."""
    if op.kind == "F" and op.stage < n_stages - 1:
        return Value("input", op.stage + 1, op.microbatch)
    if op.kind in "BI" and op.stage:
        return Value("gradient", op.stage - 1, op.microbatch)
    return None


def read_by(op: Op, n_stages: int) -> list[Value]:
    """The values that an operation reads from slots."""
    inputs = [Value("input", op.stage, op.microbatch)] if op.stage else []
    if op.kind == "F" or op.stage == n_stages - 1:
        return inputs
    return [*inputs, Value("gradient", op.stage, op.microbatch)]


def done_key(op: Op) -> tuple[str, int, int]:
    """How `waits_for` names an operation."""
    return ("I" if op.kind == "B" else op.kind, op.stage, op.microbatch)


def stuck(
    schedule: Schedule, position: list[int], done: Mapping[tuple[str, int, int], object]
) -> ScheduleError:
    """The error that says what each rank waits for."""
    lines = []
    for rank, cells in enumerate(schedule.cells):
        if position[rank] < len(cells):
            cell = cells[position[rank]]
            missing = [key for op in cell for key in waits_for(op, schedule.n_stages) if key not in done]
            lines.append(
                f"rank {rank} at {' & '.join(map(_name, cell))} waits for {' and '.join(map(_name, missing))}"
            )
    return ScheduleError(f"{schedule.name}: the ranks wait for each other: " + "; ".join(lines))


def _name(op: tuple[str, int, int]) -> str:
    kind, stage, microbatch = op
    return f"{kind} of micro-batch {microbatch} on stage {stage}"


def _first_ticks(schedule: Schedule) -> dict[Op, int]:
    done: dict[tuple[str, int, int], int] = {}
    tick_of: dict[Op, int] = {}
    position, free = [0] * schedule.n_ranks, [0] * schedule.n_ranks
    moved = True
    while moved:
        moved = False
        for rank, cells in enumerate(schedule.cells):
            while position[rank] < len(cells):
                cell = cells[position[rank]]
                before = [key for op in cell for key in waits_for(op, schedule.n_stages)]
                if any(key not in done for key in before):
                    break
                tick = max([free[rank], *(done[key] + 1 for key in before)])
                for op in cell:
                    done[done_key(op)] = tick_of[op] = tick
                free[rank], moved = tick + 1, True
                position[rank] += 1
    if any(at < len(cells) for at, cells in zip(position, schedule.cells, strict=True)):
        raise stuck(schedule, position, done)
    return tick_of


def _allocate(
    schedule: Schedule, written: dict[Value, int], last_read: dict[Value, int]
) -> tuple[dict[Value, int], dict[str, tuple[int, ...]]]:
    """The lowest free slot for each value, in the order in which they arrive."""
    free: dict[tuple[str, int], list[int]] = defaultdict(list)
    busy: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    size: dict[tuple[str, int], int] = defaultdict(int)
    slots = {}
    for value, tick in sorted(written.items(), key=lambda item: (item[1], item[0])):
        pool = value.kind, schedule.rank_of(value.stage, value.microbatch)
        # Values arrive at the end of a tick, after the tick's reads.
        while busy[pool] and busy[pool][0][0] <= tick:
            heapq.heappush(free[pool], heapq.heappop(busy[pool])[1])
        if not free[pool]:
            free[pool].append(size[pool])
            size[pool] += 1
        slots[value] = heapq.heappop(free[pool])
        heapq.heappush(busy[pool], (last_read[value], slots[value]))
    ranks = range(schedule.n_ranks)
    return slots, {kind: tuple(size[kind, rank] for rank in ranks) for kind in ("input", "gradient")}

"""How long a schedule takes and what it holds: bubbles, activations and parameters of every rank.

Each rank works off its cells in order, each cell as soon as its operands are there; sends take `send` and
cost no computation. Numbers may be ints, floats or `fractions.Fraction`s; with the last everything is exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from dsv3_jax.pipeline.cells import Cell, Op, Schedule, ScheduleError
from dsv3_jax.pipeline.table import Send, Table, done_key, stuck, waits_for

Time = int | float | Fraction


@dataclass(frozen=True)
class Durations:
    """Times of the operations of one micro-batch on one stage, in any unit."""

    forward: Time = 1
    backward: Time = 2  # The whole of it: for the input and for the weights.
    weight: Time = 1  # The backward for the weights alone.
    overlapped: Time | None = None  # F&B of two micro-batches; None: nothing is gained, forward + backward.
    send: Time = 0  # From the end of an operation to its result on another rank.

    def __post_init__(self) -> None:
        if min(self.forward, self.weight) <= 0 or self.send < 0:
            raise ScheduleError(f"{self}: forward and weight must be above 0, send at least 0")
        if self.weight >= self.backward:
            raise ScheduleError(
                f"weight = {self.weight}, backward = {self.backward}: the backward contains that for the "
                "weights; make it longer"
            )
        if not max(self.forward, self.backward) <= self.both <= self.forward + self.backward:
            raise ScheduleError(
                f"overlapped = {self.overlapped}: it lies between the longer of forward and backward and "
                f"their sum, {max(self.forward, self.backward)} to {self.forward + self.backward}"
            )

    @property
    def both(self) -> Time:
        """F&B."""
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    def scaled(self, factor: Time) -> "Durations":
        """The same work on stages `factor` times as long; a send stays as it is."""
        overlapped = None if self.overlapped is None else self.overlapped * factor
        return Durations(
            self.forward * factor, self.backward * factor, self.weight * factor, overlapped, self.send
        )

    def of(self, cell: Cell, sizes: Sequence[Time] | None = None) -> Time:
        """Of a cell; `sizes` are the stages' lengths relative to the one these durations are of."""
        alone = {"F": self.forward, "B": self.backward, "I": self.backward - self.weight, "W": self.weight}
        size = [1 if sizes is None else sizes[op.stage] for op in cell]
        time = sum(alone[op.kind] * factor for op, factor in zip(cell, size, strict=True))
        if len(cell) == 1:
            return time
        # What hides behind the other is at most what the shorter of the two stages can hide.
        return time - (self.forward + self.backward - self.both) * min(size)


@dataclass(frozen=True)
class CellTimes:
    """Measured times of whole cells, to be simulated in the place of `Durations`."""

    times: Mapping[Cell, Time]
    send: Time = 0

    def of(self, cell: Cell, sizes: Sequence[Time] | None = None) -> Time:
        """Of a cell; the times are of real stages, so `sizes` is not needed."""
        return self.times[cell]


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    schedule: Schedule
    spans: tuple[tuple[tuple[Time, Time], ...], ...]  # [rank][cell]: when it starts and ends.

    @cached_property
    def makespan(self) -> Time:
        """From the first start to the last end."""
        return max(spans[-1][1] for spans in self.spans)

    @cached_property
    def idle(self) -> tuple[Time, ...]:
        """Of each rank, within the step."""
        return tuple(self.makespan - sum(end - start for start, end in spans) for spans in self.spans)

    @property
    def bubble(self) -> Time:
        """Of the rank that idles longest, as the published formulas count it."""
        return max(self.idle)

    @property
    def bubble_fraction(self) -> float:
        """Of all ranks' time."""
        return float(sum(self.idle) / (self.makespan * self.schedule.n_ranks))


def simulate(
    schedule: Schedule, durations: Durations | CellTimes, sizes: Sequence[Time] | None = None
) -> Timeline:
    """Runs a schedule in time.

    Args:
      schedule: what to run.
      durations: of one stage of size 1.
      sizes: [stage], how many times longer each stage takes; None: all alike.

    Raises:
      ScheduleError: the ranks wait for each other, or `sizes` has not one number a stage.
    """
    if sizes is not None and len(sizes) != schedule.n_stages:
        raise ScheduleError(f"sizes has {len(sizes)} numbers; {schedule.name} has {schedule.n_stages} stages")
    done: dict[tuple[str, int, int], tuple[Time, int]] = {}  # When, and on which rank.
    spans: list[list[tuple[Time, Time]]] = [[] for _ in schedule.cells]
    moved = True
    while moved:
        moved = False
        for rank, cells in enumerate(schedule.cells):
            while len(spans[rank]) < len(cells):
                cell = cells[len(spans[rank])]
                start = _ready(cell, rank, schedule.n_stages, done, durations.send)
                if start is None:
                    break
                if spans[rank]:
                    start = max(start, spans[rank][-1][1])
                end = start + durations.of(cell, sizes)
                spans[rank].append((start, end))
                for op in cell:
                    done[done_key(op)] = end, rank
                moved = True
    position = [len(row) for row in spans]
    if any(at < len(cells) for at, cells in zip(position, schedule.cells, strict=True)):
        raise stuck(schedule, position, done)
    return Timeline(schedule, tuple(map(tuple, spans)))


def simulate_in_step(
    table: Table,
    durations: Durations | CellTimes,
    sizes: Sequence[Time] | None = None,
    *,
    senders_wait: bool = True,
    between: Time = 0,
) -> Timeline:
    """A schedule where ranks wait for each other at the end of each tick in which something is sent.

    All for all, as on fake CPU devices, whose collectives are a meeting of everybody that takes
    `durations.send`. With `senders_wait` False only those that receive, for those that send to them in that
    tick: so it is on GPUs, where a send that fits into the buffers of the link is over when it has left. It
    then takes `durations.send` of both GPUs, and what goes another way follows it. Where cells of one tick
    differ in length, as F and B of 1F1B do, both may take longer than `simulate` says, where a rank waits for
    nothing before it needs it. `between` is what the loop itself takes after each tick.
    """
    schedule = table.schedule
    sends: dict[int, list[Send]] = {}
    for send in table.sends:
        sends.setdefault(send.tick, []).append(send)
    now: list[Time] = [0] * schedule.n_ranks
    spans: list[list[tuple[Time, Time]]] = [[] for _ in now]
    for tick, row in enumerate(table.ticks):
        for rank, cell in enumerate(row):
            if cell:
                spans[rank].append((now[rank], now[rank] + durations.of(cell, sizes)))
                now[rank] = spans[rank][-1][1]
        if tick in sends and senders_wait:
            now = [max(now) + durations.send] * schedule.n_ranks
        elif tick in sends:
            now = _received(now, sends[tick], durations.send)
        now = [time + between for time in now]
    return Timeline(schedule, tuple(map(tuple, spans)))


def _received(now: list[Time], sends: Sequence[Send], time: Time) -> list[Time]:
    """When each rank goes on after the sends of a tick, one way after the other as the runner does them."""
    ways: dict[tuple[str, int], list[Send]] = {}
    for send in sends:
        ways.setdefault((send.value.kind, (send.target - send.source) % len(now)), []).append(send)
    for _, together in sorted(ways.items()):
        before, now = now, list(now)
        for send in together:
            now[send.target] = max(before[send.target], before[send.source])
        for rank in {rank for send in together for rank in (send.source, send.target)}:
            now[rank] += time
    return now


def _ready(cell: Sequence[Op], rank: int, n_stages: int, done: dict, send: Time) -> Time | None:
    """When all operands are there; None if some are not made yet."""
    start: Time = 0
    for op in cell:
        for key in waits_for(op, n_stages):
            if key not in done:
                return None
            end, source = done[key]
            start = max(start, end if source == rank else end + send)
    return start


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """[rank]: most (stage, micro-batch) pairs that are forwarded and not yet wholly backwarded at any moment.

    An activation lives from the start of its F to the end of its B or W; one is that of a stage, so
    1/n_stages of the model's for one micro-batch. In an F&B both are held.
    """
    peaks = []
    for cells in schedule.cells:
        held = peak = 0
        for cell in cells:
            held += sum(op.kind == "F" for op in cell)
            peak = max(peak, held)
            held -= sum(op.kind in "BW" for op in cell)
        peaks.append(peak)
    return tuple(peaks)


def parameters(schedule: Schedule) -> tuple[int, ...]:
    """[rank]: stages whose parameters it holds; one is 1/n_stages of the model's layers."""
    return tuple(len(schedule.stages_of(rank)) for rank in range(schedule.n_ranks))


def published_bubble(schedule: Schedule, durations: Durations) -> Time:
    """The bubble by the formula of its paper; V3 table 2 for 1F1B, ZB1P and DualPipe, with PP = `n_stages`.

    `simulate` gives the same for "gpipe", "1f1b" and "interleaved" always; for "zb1p" if weight is at most
    forward and at most half of backward, with a micro-batch a rank or more; for "dualpipe" and "dualpipev" if
    forward is backward - weight, and weight at most that (`docs/pipeline.md` says what happens elsewhere).
    """
    stages, ranks, d = schedule.n_stages, schedule.n_ranks, durations
    if schedule.name == "zb1p":
        return (stages - 1) * (d.forward + d.backward - 2 * d.weight)
    if schedule.name in ("dualpipe", "dualpipev"):
        return (stages // 2 - 1) * (d.both + d.backward - 3 * d.weight)
    return (ranks - 1) * (d.forward + d.backward)


def published_activations(schedule: Schedule) -> int:
    """The peak of the rank that holds most, by the papers; V3 table 2, Megatron's for "interleaved"."""
    stages, ranks, count = schedule.n_stages, schedule.n_ranks, schedule.n_microbatches
    if schedule.name == "gpipe":
        return count
    if schedule.name == "interleaved":
        return min(stages + ranks - 1, stages // ranks * count)
    if schedule.name in ("dualpipe", "dualpipev"):
        return stages + 1
    return min(stages, count)

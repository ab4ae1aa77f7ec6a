"""What a profile of one step through a pipeline says: when each rank did which cell, what hid what."""

import re
import statistics
import sys
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.profile_events import Event, between_starts_and_dones, merged, shared
from dsv3_jax.pipeline import CellTimes, Schedule, Timeline, place, simulate
from dsv3_jax.pipeline.simulator import simulate_in_step

# ---------------------------------------------------------------- cells


def cells_of_instructions(text: str) -> dict[str, str]:
    """The kind of cell of each instruction of a compiled program: those of the loops that the runner named.

    What the compiler moved out of such a loop belongs to no cell.
    """
    bodies, current = {}, ""
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?(\S+) \(.*\{$", line)
        if head:
            current = head.group(1)
            bodies[current] = []
        elif current:
            bodies[current].append(line)
    kinds: dict[str, str] = {}

    def walk(computation: str, kind: str) -> None:
        for line in bodies.pop(computation, ()):
            match = re.match(r"\s+(?:ROOT )?%?([^\s=]+) = ", line)
            if match:
                kinds[match.group(1)] = kind
            for called in re.findall(CALLED, line):
                for name in called.replace("%", "").split(","):
                    walk(name.strip(), kind)

    loops = re.findall(r' while\(.*body=%?([^\s,]+).*op_name="[^"]*\bcell_([FBIW]+)/while"', text)
    for body, kind in loops:
        walk(body, kind)
    return kinds


# The computations that an instruction runs.
CALLED = r"\b(?:body|condition|calls|to_apply|\w+_computations?)=\{?([^\s,{}]+(?:, ?%[^\s,{}]+)*)"


Spans = list[list[tuple[float, float]]]


def cell_spans(found: list[Event], kinds: dict[str, str], schedule: Schedule) -> Spans:
    """[rank][cell]: when it started and ended, in milliseconds; device and rank have the same number.

    An instruction that a rank ran as often as it has cells of the kind ran once in each: such ones tell where
    a cell begins, and all others of the kind belong to the cell that began last.

    Raises:
      ValueError: the profile does not show the schedule's cells in its order.
    """
    spans: Spans = []
    for rank, cells in enumerate(schedule.cells):
        wanted = ["".join(op.kind for op in cell) for cell in cells]
        seen: list[tuple[float, float, str]] = []
        for kind in sorted(set(wanted)):
            mine = [event for event in found if event.device == rank and kinds.get(event.instruction) == kind]
            runs = defaultdict(list)
            for event in mine:
                runs[event.instruction].append(event.start)
            count = wanted.count(kind)
            once = [starts for starts in runs.values() if len(starts) == count]
            if not once:
                counts = sorted({len(starts) for starts in runs.values()})
                raise ValueError(f"rank {rank}: {count} cells {kind}, instructions ran {counts} times")
            begins = [min(starts) for starts in zip(*once, strict=True)]
            parts = defaultdict(list)
            for event in mine:
                parts[max(bisect_right(begins, event.start) - 1, 0)].append(event)
            seen += [(min(e.start for e in part), max(e.end for e in part), kind) for part in parts.values()]
        seen.sort()
        if [kind for *_, kind in seen] != wanted:
            raise ValueError(f"rank {rank}: cells {[kind for *_, kind in seen]}, in the schedule {wanted}")
        spans.append([(start, end) for start, end, _ in seen])
    return spans


def bubble(found: list[Event], text: str, schedule: Schedule) -> dict:
    """`beside_the_simulator` of a profiled step; `text` is its compiled program."""
    spans = cell_spans(found, cells_of_instructions(text), schedule)
    return beside_the_simulator(spans, schedule, send=send_time(found)) | {"spans_ms": spans}


def send_time(found: list[Event]) -> float:
    """Mean milliseconds of a send between two devices: of its kernels on both, the one that waits less."""
    runs: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in found:
        if "nccl" in event.name.lower() and re.match("ppermute|collective-permute", event.instruction):
            runs[event.instruction][event.device].append(event.end - event.start)
    return statistics.mean(min(pair) for on in runs.values() for pair in zip(*on.values(), strict=True))


def beside_the_simulator(spans: Spans, schedule: Schedule, send: float | None = None) -> dict:
    """The idle share of a step beside the simulator's, with the times of its cells and of a meeting.

    Idle is what lies outside of cells, from the first start to the last end. `in_step` simulates ranks that
    meet wherever one sends, which takes the mean time of a meeting; or, given what a send takes, ranks that
    wait for what is sent to them, and for the loop between two cells. `own` is the same with the time of each
    cell, where `in_step` has the mean of a kind on a stage. `free`: ranks wait for nothing before they
    need it.
    """
    table = place(schedule)
    length = max(row[-1][1] for row in spans) - min(row[0][0] for row in spans)
    busy = [sum(end - start for start, end in row) for row in spans]
    own, times = {}, defaultdict(list)
    for cells, row in zip(schedule.cells, spans, strict=True):
        for cell, (start, end) in zip(cells, row, strict=True):
            own[cell] = end - start
            times["&".join(f"{op.kind}{op.stage}" for op in cell)].append(end - start)
    means = {kinds: statistics.mean(values) for kinds, values in times.items()}
    mean = {cell: means["&".join(f"{op.kind}{op.stage}" for op in cell)] for cell in own}
    meet = send is None
    meeting = statistics.mean(_meetings(spans, table)) if meet else send
    between = 0.0 if meet else statistics.mean(_between(spans, table))

    def step(timeline: Timeline) -> dict:
        return {"step_ms": timeline.makespan, "idle": timeline.bubble_fraction}

    def in_step(cells: dict) -> dict:
        measured = CellTimes(cells, meeting)
        return step(simulate_in_step(table, measured, senders_wait=meet, between=between))

    return {
        "measured": {"step_ms": length, "idle": 1 - sum(busy) / (length * len(busy))},
        "in_step": in_step(mean),
        "own": in_step(own),
        "free": step(simulate(schedule, CellTimes(mean, meeting if meet else 0.0))),
        "cell_ms": means,
        "cell_spread": {kinds: max(values) / min(values) for kinds, values in times.items()},
        "meeting_ms" if meet else "send_ms": meeting,
        "between_ms": between,
    }


def _meetings(spans: Spans, table) -> list[float]:
    """Of each tick with a send: from its last end to the next tick's start, a mean over ranks."""
    stops, ticks = {send.tick for send in table.sends}, _by_tick(spans, table)
    pairs = enumerate(zip(ticks, ticks[1:], strict=False))
    return [
        statistics.mean(start for start, _ in after.values()) - max(end for _, end in before.values())
        for tick, (before, after) in pairs
        if tick in stops
    ]


def _between(spans: Spans, table) -> list[float]:
    """Of each tick without a send: from the end of each rank's cell to the start of its next."""
    stops, ticks = {send.tick for send in table.sends}, _by_tick(spans, table)
    pairs = enumerate(zip(ticks, ticks[1:], strict=False))
    return [
        after[rank][0] - before[rank][1]
        for tick, (before, after) in pairs
        for rank in before
        if tick not in stops and rank in after
    ]


def _by_tick(spans: Spans, table) -> list[dict[int, tuple[float, float]]]:
    rows = [iter(row) for row in spans]
    return [{rank: next(rows[rank]) for rank, cell in enumerate(row) if cell} for row in table.ticks]


# ---------------------------------------------------------------- collectives


def overlap(found: list[Event]) -> dict:
    """Of every device: milliseconds of collectives, and how many of them lie under other kernels."""
    devices = {}
    for device in sorted({event.device for event in found}):
        collectives, others = [], []
        for event in found:
            if event.device == device:
                kind = collectives if "nccl" in event.name.lower() else others
                kind.append((event.start, event.end))
        devices[device] = {
            "collectives_ms": sum(end - start for start, end in merged(collectives)),
            "under_computation_ms": sum(shared(merged(collectives), merged(others))),
            "computation_ms": sum(end - start for start, end in merged(others)),
            "kernels": len(others),
            "collective_kernels": len(collectives),
        }
    return devices


def between(text: str) -> list[dict]:
    """For each asynchronous all-to-all: its direction, and what the compiler put inside it."""
    directions = "forward", "backward", "other"

    def scope(path: str) -> str:
        return "backward" if "backward" in path else "forward" if "forward" in path else "other"

    return [
        {"scope": found.label, "inside": {name: found.inside[name] for name in directions}}
        for found in between_starts_and_dones(text, "all-to-all", scope)
    ]

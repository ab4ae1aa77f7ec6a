"""Proofs about tables, without running them.

They share no bookkeeping with `table`: a table is walked tick by tick, with every slot holding a name.
"""

from collections import Counter

from dsv3_jax.pipeline.cells import Op, Schedule, ScheduleError
from dsv3_jax.pipeline.table import Table, Value


def check(table: Table) -> None:
    """All checks.

    Raises:
      ScheduleError: the first thing wrong: an operation missing, twice or on the wrong rank, a slot read
        before it is written, or overwritten before its last use.
    """
    check_operations(table.schedule)
    check_ticks(table)
    check_buffers(table)


def check_operations(schedule: Schedule) -> None:
    """Every micro-batch passes every stage forward once and backward once, on a rank that holds it."""
    count: Counter[Op] = Counter()
    for rank, cells in enumerate(schedule.cells):
        for cell in cells:
            kinds = "".join(op.kind for op in cell)
            if kinds not in ("F", "B", "I", "W", "FB", "FI"):
                raise ScheduleError(f"rank {rank}: a cell {kinds!r}; it is one operation, or F with B or I")
            if len({op.microbatch for op in cell}) < len(cell):
                raise ScheduleError(f"rank {rank}: {cell} overlaps a micro-batch with itself")
            for op in cell:
                if schedule.rank_of(op.stage, op.microbatch) != rank:
                    raise ScheduleError(f"rank {rank} computes {op}, which is not on its path")
                count[op] += 1
    for stage in range(schedule.n_stages):
        for m in range(schedule.n_microbatches):
            forward, whole, for_input, for_weights = (count.pop(Op(kind, stage, m), 0) for kind in "FBIW")
            if forward != 1:
                raise ScheduleError(f"F of micro-batch {m} on stage {stage}: {forward} times")
            if (whole, for_input, for_weights) not in ((1, 0, 0), (0, 1, 1)):
                raise ScheduleError(
                    f"backward of micro-batch {m} on stage {stage}: {whole} B, {for_input} I, "
                    f"{for_weights} W; it takes one B, or one I and one W"
                )
    if count:
        raise ScheduleError(f"no such stage or micro-batch: {next(iter(count))}")


def check_ticks(table: Table) -> None:
    """The ticks hold each rank's cells in the schedule's order."""
    for rank, cells in enumerate(table.schedule.cells):
        placed = tuple(row[rank] for row in table.ticks if row[rank])
        if placed != cells:
            raise ScheduleError(f"rank {rank}: the ticks do not hold its cells in order")


def check_buffers(table: Table) -> None:
    """No slot is read before it is written, or overwritten before its last use; W comes after its I."""
    schedule = table.schedule
    last = schedule.n_stages - 1
    split = {
        (op.stage, op.microbatch) for row in table.ticks for cell in row for op in cell if op.kind == "W"
    }
    held: dict[tuple[str, int, int], Value] = {}  # (kind, rank, slot): what is there.
    uses: dict[Value, int] = {}  # Reads to come of what is there.
    done: set[Op] = set()
    sends = {send.value: send for send in table.sends}
    if len(sends) != len(table.sends):
        raise ScheduleError("a value is sent twice")
    for tick, row in enumerate(table.ticks):
        for rank, cell in enumerate(row):
            for op in cell:
                _read(table, held, uses, tick, rank, op)
                if op.kind == "W" and op._replace(kind="I") not in done:
                    raise ScheduleError(f"tick {tick}, rank {rank}: {op} before its backward for the input")
                # Only the last stage goes backward with nothing received: its own forward must be over.
                if op.kind in "BI" and op._replace(kind="F") not in done:
                    raise ScheduleError(f"tick {tick}, rank {rank}: {op} before its forward")
        # Everything made in this tick arrives at its end.
        for rank, cell in enumerate(row):
            for op in cell:
                done.add(op)
                if op.kind == "F" and op.stage < last:
                    value = Value("input", op.stage + 1, op.microbatch)
                    reads = 2 + ((op.stage + 1, op.microbatch) in split)
                elif op.kind in "BI" and op.stage > 0:
                    value = Value("gradient", op.stage - 1, op.microbatch)
                    reads = 1 + ((op.stage - 1, op.microbatch) in split)
                else:
                    continue
                target = schedule.rank_of(value.stage, value.microbatch)
                send = sends.pop(value, None)
                if (send is None) != (target == rank) or send and send[:3] != (tick, rank, target):
                    raise ScheduleError(
                        f"tick {tick}, rank {rank}: {value} is for rank {target}, sent as {send}"
                    )
                _write(table, held, uses, tick, target, value, reads)
    if left := [value for value, count in uses.items() if count]:
        raise ScheduleError(f"never used to the end: {left[0]}")
    if sends:
        raise ScheduleError(f"sent but never made: {next(iter(sends))}")


def _read(table: Table, held: dict, uses: dict, tick: int, rank: int, op: Op) -> None:
    needed = []
    if op.stage > 0:
        needed.append(Value("input", op.stage, op.microbatch))
    if op.kind != "F" and op.stage < table.schedule.n_stages - 1:
        needed.append(Value("gradient", op.stage, op.microbatch))
    for value in needed:
        slot = table.slots.get(value)
        found = held.get((value.kind, rank, slot)) if slot is not None else None
        if found != value:
            raise ScheduleError(
                f"tick {tick}, rank {rank}: {op} reads {value} in slot {slot}, where {found} is"
            )
        uses[value] -= 1


def _write(table: Table, held: dict, uses: dict, tick: int, rank: int, value: Value, reads: int) -> None:
    slot = table.slots.get(value)
    if slot is None or not 0 <= slot < table.n_slots[value.kind][rank]:
        raise ScheduleError(
            f"tick {tick}, rank {rank}: {value} has slot {slot} of {table.n_slots[value.kind][rank]}"
        )
    before = held.get((value.kind, rank, slot))
    if before is not None and uses[before]:
        raise ScheduleError(f"tick {tick}, rank {rank}: {value} overwrites {before}, which is still needed")
    held[value.kind, rank, slot] = value
    uses[value] = reads

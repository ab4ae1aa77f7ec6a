"""A table as numbers: what the runner's loop reads, tick by tick."""

import numpy as np

from dsv3_jax.pipeline.cells import Op
from dsv3_jax.pipeline.table import Table, made_by, read_by

Channel = tuple[str, int]  # What travels, and how many ranks onward; 0 is to a rank's own next chunk.


def numbered(table: Table) -> tuple[list[str], dict[str, np.ndarray], list[Channel]]:
    """The table as numbers.

    Returns:
      the kinds of cells, by number; int32 arrays [tick, rank] by name: the kind (past the last: idle), where
      the operands of its forward (f_...) and backward (b_...) are, and in which slot a channel's value
      arrives; the channels.
    """
    schedule = table.schedule
    shape = len(table.ticks), schedule.n_ranks
    chunk_of = [{stage: c for c, stage in enumerate(schedule.stages_of(r))} for r in range(schedule.n_ranks)]
    kinds = sorted({_kinds(cell) for row in table.ticks for cell in row if cell})
    spare = {kind: max(sizes) for kind, sizes in table.n_slots.items()}
    names = ["kind", *(f"{half}_{what}" for half in "fb" for what in ("stage", "chunk", "micro"))]
    columns = {name: np.zeros(shape, np.int32) for name in names}
    columns |= {name: np.full(shape, spare["input"], np.int32) for name in ("f_input", "b_input")}
    columns["b_gradient"] = np.full(shape, spare["gradient"], np.int32)
    channels = set()
    for tick, row in enumerate(table.ticks):
        for rank, cell in enumerate(row):
            columns["kind"][tick, rank] = kinds.index(_kinds(cell)) if cell else len(kinds)
            for op in cell:
                half = "f" if op.kind == "F" else "b"
                columns[f"{half}_stage"][tick, rank] = op.stage
                columns[f"{half}_chunk"][tick, rank] = chunk_of[rank][op.stage]
                columns[f"{half}_micro"][tick, rank] = op.microbatch
                for value in read_by(op, schedule.n_stages):
                    columns[f"{half}_{value.kind}"][tick, rank] = table.slots[value]
                value = made_by(op, schedule.n_stages)
                if value is not None:
                    target = schedule.rank_of(value.stage, value.microbatch)
                    channel = value.kind, (target - rank) % schedule.n_ranks
                    channels.add(channel)
                    empty = np.full(shape, spare[value.kind], np.int32)
                    columns.setdefault(f"{channel[0]}{channel[1]}", empty)[tick, target] = table.slots[value]
    return kinds, columns, sorted(channels)


Route = tuple[tuple[tuple[int, int], ...], ...]  # [channel]: (source, target) of what travels on it.


def routes_of(table: Table, channels: list[Channel]) -> tuple[list[Route], np.ndarray]:
    """The different ways in which ranks send to each other in a tick, and [tick] which of them it is."""
    n_ranks = table.schedule.n_ranks
    pairs: list[list[list[tuple[int, int]]]] = [[[] for _ in channels] for _ in table.ticks]
    for send in table.sends:
        channel = send.value.kind, (send.target - send.source) % n_ranks
        pairs[send.tick][channels.index(channel)].append((send.source, send.target))
    by_tick = [tuple(tuple(sorted(on)) for on in row) for row in pairs]
    routes = sorted(set(by_tick))
    return routes, np.array([routes.index(route) for route in by_tick], np.int32)


def _kinds(cell: tuple[Op, ...]) -> str:
    return "".join(op.kind for op in cell)

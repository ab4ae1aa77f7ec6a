"""A simulated schedule drawn like the papers' figures: time to the right, a row a rank.

Numbers are micro-batches, counted in each direction from 0. The second chunk of a rank (DualPipe: the other
direction) is lower case in text and paler in the picture. F&B has a thick border there, and `&` in text.
"""

import math
from pathlib import Path

from dsv3_jax.pipeline.cells import Cell, Op, Schedule
from dsv3_jax.pipeline.simulator import Timeline

# Of the first chunk and of the others, as DeepSeek-V3 figure 5 colours them.
COLORS = {
    "F": ("#f4b96a", "#fbe3c0"),
    "B": ("#7fae7a", "#c3dcc0"),
    "I": ("#9cc9d9", "#d6eaf1"),
    "W": ("#7f9fd0", "#c5d3ea"),
}
MEANING = {"F": "forward", "B": "backward", "I": "backward for input", "W": "backward for weights"}
MAX_COLUMNS = 4000


def text(timeline: Timeline, width: int = 0) -> str:
    """The chart in characters.

    Args:
      timeline: what `simulate` returned.
      width: columns of a line, above which the chart goes on below; 0: one line a rank.

    Returns:
      Lines; in each, the letter of the operation and the micro-batch, then dots until it ends; blank is idle.
    """
    schedule = timeline.schedule
    cells = [
        (cell, start, end)
        for row, spans in zip(schedule.cells, timeline.spans, strict=True)
        for cell, (start, end) in zip(row, spans, strict=True)
    ]
    # Wide enough for every label, unless one operation is very much shorter than the step.
    columns_a_unit = max((len(_label(schedule, cell)) + 1) / (end - start) for cell, start, end in cells)
    columns_a_unit = min(float(columns_a_unit), MAX_COLUMNS / float(timeline.makespan))
    total = math.ceil(timeline.makespan * columns_a_unit)
    names = [f"rank {rank}" for rank in range(schedule.n_ranks)]
    margin = max(map(len, names)) + 1
    rows = []
    for row, spans in zip(schedule.cells, timeline.spans, strict=True):
        line = [" "] * total
        for cell, (start, end) in zip(row, spans, strict=True):
            first, last = round(start * columns_a_unit), round(end * columns_a_unit)
            line[first:last] = _label(schedule, cell).ljust(last - first, ".")[: last - first]
        rows.append("".join(line))
    step = max(width - margin, 20) if width else total
    blocks = [
        [name.ljust(margin) + row[at : at + step].rstrip() for name, row in zip(names, rows, strict=True)]
        for at in range(0, total, step)
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def png(timeline: Timeline, path: str | Path) -> None:
    """Writes the chart as a picture."""
    # Not through pyplot: no window system is looked for, and no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    schedule = timeline.schedule
    length = float(timeline.makespan)
    n_cells = max(map(len, schedule.cells))
    figure = Figure(figsize=(min(60.0, 3 + 0.32 * n_cells), 1.4 + 0.34 * schedule.n_ranks), dpi=120)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for rank, (cells, spans) in enumerate(zip(schedule.cells, timeline.spans, strict=True)):
        for cell, (start, end) in zip(cells, spans, strict=True):
            left, part = float(start), float(end - start) / len(cell)
            for number, op in enumerate(cell):
                color = COLORS[op.kind][min(_chunk(schedule, op), 1)]
                x = left + number * part
                axes.add_patch(
                    Rectangle((x, rank), part, 1, facecolor=color, edgecolor="gray", linewidth=0.4)
                )
                axes.text(
                    x + part / 2, rank + 0.5, str(_number(schedule, op)), ha="center", va="center", size=6
                )
            if len(cell) == 2:
                border = Rectangle(
                    (left, rank), float(end - start), 1, fill=False, edgecolor="black", zorder=3
                )
                axes.add_patch(border)
    axes.set_xlim(0, length)
    axes.set_ylim(schedule.n_ranks, 0)
    axes.set_yticks([rank + 0.5 for rank in range(schedule.n_ranks)], map(str, range(schedule.n_ranks)))
    axes.set_ylabel("rank")
    axes.set_xlabel("time")
    axes.set_title(
        f"{schedule.name}: {schedule.n_ranks} ranks, {schedule.n_microbatches} micro-batches, "
        f"{timeline.bubble_fraction:.1%} idle"
    )
    kinds = sorted({op.kind for row in schedule.cells for cell in row for op in cell}, key="FBIW".index)
    handles = [Patch(facecolor=COLORS[kind][0], label=MEANING[kind]) for kind in kinds]
    if any(len(cell) == 2 for row in schedule.cells for cell in row):
        handles.append(Patch(facecolor="none", edgecolor="black", label="overlapped"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7, frameon=False)
    figure.savefig(path)


def _chunk(schedule: Schedule, op: Op) -> int:
    return schedule.stages_of(schedule.rank_of(op.stage, op.microbatch)).index(op.stage)


def _number(schedule: Schedule, op: Op) -> int:
    share = schedule.n_microbatches // len(schedule.paths)
    return op.microbatch - schedule.direction(op.microbatch) * share


def _label(schedule: Schedule, cell: Cell) -> str:
    words = (
        (op.kind.lower() if _chunk(schedule, op) else op.kind) + str(_number(schedule, op)) for op in cell
    )
    return "&".join(words)

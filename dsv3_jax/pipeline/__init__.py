"""Pipeline parallelism: schedules as tables, proven, simulated, drawn, and run by `runner`."""

from dsv3_jax.pipeline.cells import Cell, Op, Schedule, ScheduleError
from dsv3_jax.pipeline.schedules import NAMES, build, stage_sizes
from dsv3_jax.pipeline.simulator import CellTimes, Durations, Timeline, simulate
from dsv3_jax.pipeline.table import Send, Table, Value, place

__all__ = [
    "NAMES",
    "Cell",
    "CellTimes",
    "Durations",
    "Op",
    "Schedule",
    "ScheduleError",
    "Send",
    "Table",
    "Timeline",
    "Value",
    "build",
    "place",
    "simulate",
    "stage_sizes",
]

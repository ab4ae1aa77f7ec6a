"""What a pipeline schedule is made of.

A model is cut into stages. A schedule gives every rank a list of cells, worked off in order; a cell is one
operation of one micro-batch on one stage, or two of different micro-batches that overlap:

    F  forward
    B  the whole backward: for the input and for the weights
    I  backward for the input alone, which the stage before waits for
    W  backward for the weights, which nobody waits for
    F&B  a forward and a backward whose communication hides behind each other's computation
"""

from dataclasses import dataclass
from typing import NamedTuple


class Op(NamedTuple):
    """One operation."""

    kind: str  # "F", "B", "I" or "W".
    stage: int  # Of the model, 0 is first.
    microbatch: int


Cell = tuple[Op, ...]


@dataclass(frozen=True)
class Schedule:
    """What every rank computes, in order."""

    name: str
    n_microbatches: int
    paths: tuple[tuple[int, ...], ...]  # [direction][stage]: the rank; equal shares of the micro-batches.
    cells: tuple[tuple[Cell, ...], ...]  # [rank]

    @property
    def n_ranks(self) -> int:
        return len(self.cells)

    @property
    def n_stages(self) -> int:
        return len(self.paths[0])

    def direction(self, microbatch: int) -> int:
        """Which path a micro-batch takes; the first share takes path 0, the next path 1."""
        return microbatch * len(self.paths) // self.n_microbatches

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that computes a stage for a micro-batch."""
        return self.paths[self.direction(microbatch)][stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose parameters a rank holds; the position in it is called a chunk."""
        held = (stage for path in self.paths for stage, owner in enumerate(path) if owner == rank)
        return tuple(dict.fromkeys(held))


class ScheduleError(ValueError):
    """A schedule that cannot be: the reason, and the nearest that can."""

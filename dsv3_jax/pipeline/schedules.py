"""Pipeline schedules as data: which rank computes what, in which order.

A model is cut into stages. A schedule gives every rank a list of cells, worked off in order; a cell is one
operation of one micro-batch on one stage, or two of different micro-batches that overlap:

    F  forward
    B  the whole backward: for the input and for the weights
    I  backward for the input alone, which the stage before waits for
    W  backward for the weights, which nobody waits for
    F&B  a forward and a backward whose communication hides behind each other's computation

Nothing here knows about time, memory or JAX: `table` puts cells on ticks and values into buffers,
`simulator` gives them durations, `checks` proves them, `chart` draws them.

Sources: GPipe (arXiv 1811.06965), 1F1B (PipeDream-Flush, arXiv 2006.09503), interleaved 1F1B (Megatron-LM,
arXiv 2104.04473), ZB1P (ZB-H1 of arXiv 2401.10241), DualPipe (DeepSeek-V3 §3.2.1, arXiv 2412.19437),
DualPipeV (its halves folded into a V, so that no parameter is held twice).
"""

import difflib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

NAMES = ("gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")


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


def build(name: str, n_ranks: int, n_microbatches: int, *, chunks: int = 2) -> Schedule:
    """A schedule by name.

    Args:
      name: one of `NAMES`.
      n_ranks: ranks of the pipeline.
      n_microbatches: micro-batches a step, of both directions together.
      chunks: stages a rank, at least 2; of "interleaved" only.

    Raises:
      ScheduleError: no such schedule; the message says why and names the nearest that can be.
    """
    refuse(name, n_ranks, n_microbatches, chunks=chunks)
    builders = {
        "gpipe": _gpipe,
        "1f1b": _one_f_one_b,
        "zb1p": _zb1p,
        "dualpipe": _dualpipe,
        "dualpipev": _dualpipev,
    }
    if name == "interleaved":
        return _interleaved(n_ranks, n_microbatches, chunks)
    return builders[name](n_ranks, n_microbatches)


def refuse(name: str, n_ranks: int, n_microbatches: int, *, chunks: int = 2) -> None:
    """Raises ScheduleError with the reason and the nearest that can be, if there is no such schedule."""
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, 1)
        raise ScheduleError(
            f"pipeline = {name!r}: no such schedule; "
            + (f"did you mean {close[0]!r}? " if close else "")
            + f"There are {', '.join(NAMES)}"
        )
    for what, value in (("ranks", n_ranks), ("microbatches", n_microbatches), ("chunks", chunks)):
        if value < 1:
            raise ScheduleError(f"{name}: {what} = {value}; give at least 1")
    if name == "interleaved" and chunks == 1:
        raise ScheduleError("interleaved: chunks = 1, but one chunk a rank is 1f1b; take that, or at least 2")
    asked = f"{name} on {n_ranks} ranks with {n_microbatches} micro-batches"
    ranks, count = n_ranks, n_microbatches
    reasons = []
    if name == "dualpipe":
        if n_ranks % 2:
            ranks = n_ranks + 1
            reasons.append("micro-batches enter at both ends and meet in the middle, so ranks must be even")
        if n_microbatches % 2:
            count = n_microbatches + 1
            reasons.append("both directions take half of the micro-batches, so they must be even")
    if name in ("dualpipe", "dualpipev") and count < 2 * ranks:
        count = 2 * ranks
        reasons.append("the warm-up needs at least two micro-batches a rank")
    if name == "interleaved" and n_microbatches % n_ranks:
        count = max(1, round(n_microbatches / n_ranks)) * n_ranks
        reasons.append(
            "micro-batches take turns in groups of one a rank, so they must be a multiple of ranks"
        )
    if reasons:
        others = "1f1b and zb1p take any number of both"
        raise ScheduleError(
            f"{asked}: {'; '.join(reasons)}. Nearest: {name} on {ranks} ranks with {count} micro-batches; "
            f"{others}"
        )


def n_stages(name: str, n_ranks: int, chunks: int = 2) -> int:
    """Stages of a schedule: what the model's layers are cut into."""
    return n_ranks * {"interleaved": chunks, "dualpipev": 2}.get(name, 1)


def stage_sizes(n_layers: int, n_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as can be; the longer ones lie in the middle.

    The first stage also embeds and the last also computes the logits, so they get the smaller share.

    Raises:
      ScheduleError: fewer layers than stages.
    """
    if n_layers < n_stages:
        raise ScheduleError(
            f"too few layers: {n_layers} layers in {n_stages} stages: every stage needs a layer. "
            f"Nearest: {n_layers} stages, or {n_stages} layers"
        )
    base, longer = divmod(n_layers, n_stages)
    first = (n_stages - longer) // 2
    return tuple(base + (first <= stage < first + longer) for stage in range(n_stages))


def _straight(n_ranks: int) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(n_ranks)),)


def _gpipe(n_ranks: int, n_microbatches: int) -> Schedule:
    """All forward, then all backward, the last micro-batch first."""
    every = range(n_microbatches)
    cells = tuple(
        tuple([(Op("F", rank, m),) for m in every] + [(Op("B", rank, m),) for m in reversed(every)])
        for rank in range(n_ranks)
    )
    return Schedule("gpipe", n_microbatches, _straight(n_ranks), cells)


def _one_f_one_b(n_ranks: int, n_microbatches: int) -> Schedule:
    """Forward until the first backward arrives, then one of each in turn."""
    cells = []
    for rank in range(n_ranks):
        forward = [Op("F", rank, m) for m in range(n_microbatches)]
        backward = [Op("B", rank, m) for m in range(n_microbatches)]
        cells.append(_alternate(forward, backward, warmup=n_ranks - rank - 1))
    return Schedule("1f1b", n_microbatches, _straight(n_ranks), tuple(cells))


def _interleaved(n_ranks: int, n_microbatches: int, chunks: int) -> Schedule:
    """1F1B over several stages a rank: groups of `n_ranks` micro-batches pass chunk after chunk."""
    cells = []
    for rank in range(n_ranks):
        order = [
            (chunk, group + m)
            for group in range(0, n_microbatches, n_ranks)
            for chunk in range(chunks)
            for m in range(n_ranks)
        ]
        forward = [Op("F", chunk * n_ranks + rank, m) for chunk, m in order]
        backward = [Op("B", (chunks - 1 - chunk) * n_ranks + rank, m) for chunk, m in order]
        warmup = 2 * (n_ranks - rank - 1) + (chunks - 1) * n_ranks
        cells.append(_alternate(forward, backward, warmup))
    path = tuple(rank for _ in range(chunks) for rank in range(n_ranks))
    return Schedule("interleaved", n_microbatches, (path,), tuple(cells))


def _alternate(forward: list[Op], backward: list[Op], warmup: int) -> tuple[Cell, ...]:
    ahead, rest = forward[:warmup], forward[warmup:]
    cells = [(op,) for op in ahead]
    for number, op in enumerate(backward):
        if number < len(rest):
            cells.append((rest[number],))
        cells.append((op,))
    return tuple(cells)


def _zb1p(n_ranks: int, n_microbatches: int) -> Schedule:
    """1F1B whose backward for weights comes later and fills the bubble.

    Rank r lags r micro-batches behind with W, so that each rank holds as many activations as rank 0.
    """
    cells = []
    for rank in range(n_ranks):
        forward = iter([(Op("F", rank, m),) for m in range(n_microbatches)])
        weights = deque((Op("W", rank, m),) for m in range(n_microbatches))
        order: list[Cell] = [cell for _, cell in zip(range(n_ranks - rank), forward, strict=False)]
        for m in range(n_microbatches):
            order.append((Op("I", rank, m),))
            if m >= rank:
                order.append(weights.popleft())
            order.extend(cell for _, cell in zip(range(1), forward, strict=False))
        cells.append((*order, *weights))
    return Schedule("zb1p", n_microbatches, _straight(n_ranks), tuple(cells))


def _dualpipe(n_ranks: int, n_microbatches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at rank 0, half at the last; every rank holds two stages."""
    half = n_microbatches // 2
    cells = []
    for rank in range(n_ranks):
        mirrored = n_ranks - 1 - rank
        down = _Stream(stage=rank, first=0)
        up = _Stream(stage=mirrored, first=half)
        near, far = (down, up) if rank < mirrored else (up, down)
        cells.append(tuple(_dualpipe_rank(min(rank, mirrored), n_ranks // 2, half, near, far)))
    down_path = tuple(range(n_ranks))
    return Schedule("dualpipe", n_microbatches, (down_path, down_path[::-1]), tuple(cells))


def _dualpipev(n_ranks: int, n_microbatches: int) -> Schedule:
    """DualPipeV: 2 n_ranks stages run down the ranks and up again; rank r holds the r-th of each leg."""
    down_path = tuple(range(n_ranks))
    path = down_path + down_path[::-1]
    cells = tuple(
        tuple(
            _dualpipe_rank(
                rank, n_ranks, n_microbatches, _Stream(rank, 0), _Stream(2 * n_ranks - 1 - rank, 0)
            )
        )
        for rank in range(n_ranks)
    )
    return Schedule("dualpipev", n_microbatches, (path,), cells)


class _Stream:
    """The operations of one rank on one stage, each micro-batch in turn."""

    def __init__(self, stage: int, first: int):
        self._stage = stage
        self._next = dict.fromkeys("FB", first)

    def forward(self) -> Op:
        return self._take("F", "F")

    def backward(self) -> Op:
        return self._take("B", "B")

    def split(self, weights: deque[Op]) -> Op:
        """Backward for the input; that for the weights is left in `weights`."""
        op = self._take("I", "B")
        weights.append(op._replace(kind="W"))
        return op

    def _take(self, kind: str, counter: str) -> Op:
        self._next[counter] += 1
        return Op(kind, self._stage, self._next[counter] - 1)


def _dualpipe_rank(position: int, half: int, count: int, near: _Stream, far: _Stream) -> Iterator[Cell]:
    """The cells of one rank in the eight phases of DualPipe.

    Args:
      position: ranks between this one and its end of the pipeline, below `half`.
      half: ranks from an end to the middle.
      count: micro-batches of each stream.
      near: micro-batches that entered at this rank's end.
      far: those that entered at the other end (DualPipeV: that come back from the turn).
    """
    inner = half - position - 1  # Ranks between this one and the middle.
    weights: deque[Op] = deque()
    # 1. Fill: forward of the near stream, until the far one arrives.
    for _ in range(2 * inner):
        yield (near.forward(),)
    # 2. Forward of both streams in turn.
    for _ in range(position + 1):
        yield (near.forward(),)
        yield (far.forward(),)
    # 3. The far stream's first backward passes; W fills the wait.
    for _ in range(inner):
        yield (far.split(weights),)
        yield (weights.popleft(),)
        yield (far.forward(),)
    # 4. The main phase: forward of one stream over backward of the other. The innermost rank starts with two
    #    single cells: its neighbour waits for the forward.
    for number in range(count - 2 * half + position + 1):
        if number == 0 and inner == 0:
            yield (near.forward(),)
            yield (far.backward(),)
        else:
            yield (near.forward(), far.backward())
        yield (far.forward(), near.backward())
    # 5. The near stream has nothing left to forward.
    for _ in range(inner):
        yield (far.backward(),)
        yield (far.forward(), near.backward())
    # 6. Backward of both streams in turn; the second half leaves W for the bubbles to come.
    for number in range(2 * (position + 1)):
        stream = near if number % 2 else far
        yield (stream.split(weights) if number > position else stream.backward(),)
    # 7. The near stream's last backward passes; W fills the wait.
    for _ in range(inner):
        yield (weights.popleft(),)
        yield (near.split(weights),)
    # 8. What is left of W.
    while weights:
        yield (weights.popleft(),)

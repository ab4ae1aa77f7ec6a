"""Pipeline schedules as data: which rank computes what, in which order.

Nothing here knows about time, memory or JAX: `table` puts cells on ticks and values into buffers,
`simulator` gives them durations, `checks` proves them, `chart` draws them.

Sources: GPipe (arXiv 1811.06965), 1F1B (PipeDream-Flush, arXiv 2006.09503), interleaved 1F1B (Megatron-LM,
arXiv 2104.04473), ZB1P (ZB-H1 of arXiv 2401.10241); DualPipe and DualPipeV are in `dualpipe`.
"""

import difflib
from collections import deque

from dsv3_jax.pipeline.cells import Cell, Op, Schedule, ScheduleError
from dsv3_jax.pipeline.dualpipe import dualpipe, dualpipev

NAMES = ("gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")


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
        "dualpipe": dualpipe,
        "dualpipev": dualpipev,
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

"""DualPipe (DeepSeek-V3 §3.2.1, arXiv 2412.19437), and DualPipeV, its halves folded into a V."""

from collections import deque
from collections.abc import Iterator

from dsv3_jax.pipeline.cells import Cell, Op, Schedule


def dualpipe(n_ranks: int, n_microbatches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at rank 0, half at the last; every rank holds two stages."""
    half = n_microbatches // 2
    cells = []
    for rank in range(n_ranks):
        mirrored = n_ranks - 1 - rank
        down = _Stream(stage=rank, first=0)
        up = _Stream(stage=mirrored, first=half)
        near, far = (down, up) if rank < mirrored else (up, down)
        cells.append(tuple(_rank(min(rank, mirrored), n_ranks // 2, half, near, far)))
    down_path = tuple(range(n_ranks))
    return Schedule("dualpipe", n_microbatches, (down_path, down_path[::-1]), tuple(cells))


def dualpipev(n_ranks: int, n_microbatches: int) -> Schedule:
    """DualPipeV: 2 n_ranks stages run down the ranks and up again; rank r holds the r-th of each leg."""
    down_path = tuple(range(n_ranks))
    path = down_path + down_path[::-1]
    cells = tuple(
        tuple(_rank(rank, n_ranks, n_microbatches, _Stream(rank, 0), _Stream(2 * n_ranks - 1 - rank, 0)))
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


def _rank(position: int, half: int, count: int, near: _Stream, far: _Stream) -> Iterator[Cell]:
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

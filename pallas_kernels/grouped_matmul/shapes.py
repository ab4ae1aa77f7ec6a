"""Named shapes of `grouped_matmul` that tests and benchmarks share, and group sizes to run them with."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """`rows` rows of width `k`, `groups` matrices `[k, n]`; `spread` is how the rows fall on the groups."""

    groups: int
    rows: int
    k: int
    n: int
    spread: str = "uniform"

    def __str__(self) -> str:
        return f"{self.groups}g {self.rows}x{self.k}->{self.n} {self.spread}"

    def sizes(self, seed: int = 0) -> np.ndarray:
        """Rows of each group, int32.

        `uniform`: the same for all; `zipf`: in proportion to 1/rank, in random order; `64-512`: anything
        in that range, scaled down if they do not fit.
        """
        rng = np.random.default_rng(seed)
        if self.spread == "uniform":
            return np.full(self.groups, self.rows // self.groups, np.int32)
        if self.spread == "zipf":
            weight = rng.permutation(1 / np.arange(1, self.groups + 1))
            return rng.multinomial(self.rows, weight / weight.sum()).astype(np.int32)
        low, high = (int(part) for part in self.spread.split("-"))
        sizes = rng.integers(low, high + 1, self.groups)
        return (sizes * min(1, self.rows / sizes.sum())).astype(np.int32)


BENCHMARK = tuple(
    Shape(groups, rows, k, n, spread)
    for groups, rows, k, n in [
        (64, 32768, 2048, 2816),
        (64, 32768, 1408, 2048),
        (4, 32768, 7168, 4096),
    ]
    for spread in ("uniform", "zipf")
) + (
    Shape(256, 256 * 288, 2048, 2816, "64-512"),
    Shape(256, 256 * 288, 1408, 2048, "64-512"),
    Shape(64, 196608, 2048, 2816, "zipf"),  # 8 sequences of 4096 tokens, 6 experts each.
    Shape(64, 196608, 1408, 2048, "zipf"),
)

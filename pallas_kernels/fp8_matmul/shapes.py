"""Named shapes of `fp8_matmul` that tests and benchmarks share: DeepSeek-V3's and DeepGEMM's."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """`[m, k] @ [n, k].T`; `wgrad`: both operands scaled by row."""

    m: int
    n: int
    k: int
    wgrad: bool = False

    def __str__(self) -> str:
        return f"{'wgrad ' if self.wgrad else ''}{self.m}x{self.n}x{self.k}"


BENCHMARK = (
    Shape(8192, 8192, 8192),
    Shape(4096, 7168, 16384),
    Shape(4096, 4096, 7168),
    Shape(4096, 24576, 1536),
    Shape(8192, 2048, 7168),
    Shape(2816, 2048, 32768, wgrad=True),
    Shape(7168, 2048, 8192, wgrad=True),
)

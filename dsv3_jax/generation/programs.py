"""How generation's programs are compiled: so that a draft changes nothing of the token before it."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.config import ModelConfig

# Roundings are where they are written: else the compiler leaves some out where it fuses, and a step of two
# tokens may not be fused as one of one is.
AS_WRITTEN = {"xla_allow_excess_precision": False}
# On a GPU, where a model can draft: the kernel of a product is chosen by its shape, not by timing several,
# which another process may find otherwise. Decoding takes the compiler's own kernels, in their default tiles:
# the library's were slower. For one number of prompts those tiles were seven times slower, so reading prompts
# takes the library's (`docs/generation.md`).
FEW_ROWS = {"xla_gpu_autotune_level": 0}
MANY_ROWS = FEW_ROWS | {"xla_gpu_enable_triton_gemm": False}


class Program:
    """A function compiled in one way for models that can draft, in another for those that cannot.

    Args:
      f: the function. One of its arguments is `config`, the model, which is static.
      rows: `FEW_ROWS` for decoding, `MANY_ROWS` for prompts.
      static: names of other static arguments.
      donate: name of the argument that is donated.
    """

    def __init__(
        self, f: Callable[..., Any], rows: dict[str, Any], *, static: tuple[str, ...] = (), donate: str
    ) -> None:
        jit = functools.partial(jax.jit, f, static_argnames=("config", *static), donate_argnames=donate)
        self._alone = jit(compiler_options=AS_WRITTEN)
        self._drafting = jit(compiler_options=AS_WRITTEN | rows)

    def of(self, config: ModelConfig) -> Any:
        """The jitted function for this model."""
        return self._drafting if config.mtp.depth else self._alone

"""What every part of the model is made of: parameters with logical axes, linear maps, RMSNorm, SwiGLU.

`recipe` is None where products are taken in the dtype of their operands, and else the FP8 recipe.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax import precision
from dsv3_jax.config import FP8Config
from dsv3_jax.parallel.mesh import current_mesh, spec


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float
) -> Array:
    """Declares a float32 parameter of `module`, normal with deviation `std`, with its logical axes."""
    init = nn.with_partitioning(nn.initializers.normal(std), axes)
    return cast(Array, module.param(name, init, shape, jnp.float32))  # Linen unboxes what it returns.


# For element-wise functions: the backward pass keeps their inputs and computes what is inside them again,
# which costs less than writing and reading what they keep by default, two fifths of a MoE block.
recompute = functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False
)


@functools.partial(recompute, static_argnums=2)
def rms_norm(x: Float[Array, "*batch d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*batch d"]:
    """RMSNorm (arXiv 1910.07467), in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return (normal * scale).astype(x.dtype)


@recompute
def swiglu(gate_up: Float[Array, "*batch two_f"]) -> Float[Array, "*batch f"]:
    """SiLU(gate) * up (arXiv 2002.05202); the gate is the first half of the last axis."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def linear(
    x: Float[Array, "*batch d"],
    w: Float[Array, "d *out"],
    recipe: FP8Config | None = None,
    *,
    after_attention: bool = False,
) -> Float[Array, "..."]:
    """`x @ w` in the dtype of x; `after_attention` as for `precision.linear`."""
    if recipe is None:
        return jnp.tensordot(x, w.astype(x.dtype), 1)

    def product(x, w):
        return precision.linear(x, w, recipe, after_attention)

    y = _on_each_device(product, x, w.reshape(w.shape[0], -1))
    return y.reshape(*x.shape[:-1], *w.shape[1:])


def ffn(
    x: Float[Array, "*batch d"],
    gate_up: Float[Array, "d two_f"],
    down: Float[Array, "f d"],
    recipe: FP8Config | None = None,
) -> Float[Array, "*batch d"]:
    """The SwiGLU feed-forward network, in the dtype of x."""
    if recipe is None:
        hidden = checkpoint_name(x @ gate_up.astype(x.dtype), "ffn_gate_up")
        return swiglu(hidden) @ down.astype(x.dtype)

    def local(x, gate_up, down):
        return precision.ffn(x, None, gate_up, down, None, recipe, "ffn_gate_up")

    return _on_each_device(local, x, gate_up, down)


def _on_each_device(
    function: Callable[..., Any], x: Float[Array, "*batch d"], *weights: Array
) -> Float[Array, "*batch out"]:
    """`function(rows of x, *weights)`, under a mesh on each device's own part of the batch.

    The partitioner cannot split a kernel. The weight gradients are summed over the devices.
    """

    def local(x, *weights):
        out = function(x.reshape(-1, x.shape[-1]), *weights)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    mesh = current_mesh()
    if mesh is None:
        return local(x, *weights)
    batch, whole = spec("batch"), spec()
    in_specs = (batch, *[whole for _ in weights])
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=batch, check_vma=False)(x, *weights)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale; the leaf is called `scale`, which weight decay passes over."""

    eps: float

    @nn.compact
    def scale(self, width: int) -> Float[Array, " width"]:
        """Declares the scale alone, for a pure function that does the rest."""
        init = nn.with_partitioning(nn.initializers.ones, ("norm",))
        return cast(Array, self.param("scale", init, (width,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return rms_norm(x, self.scale(x.shape[-1]), self.eps)


class FFN(nn.Module):
    """A dense SwiGLU layer of hidden width `d_ff`: gate and up are one matrix, the gate first."""

    d_ff: int
    init_std: float
    recipe: FP8Config | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        d_model = x.shape[-1]
        gate_up = weight(self, "gate_up", (d_model, 2 * self.d_ff), ("embed", "mlp"), self.init_std)
        down = weight(self, "down", (self.d_ff, d_model), ("mlp", "embed"), self.init_std)
        return ffn(x, gate_up, down, self.recipe)

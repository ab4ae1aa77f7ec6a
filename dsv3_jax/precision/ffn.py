"""The SwiGLU feed-forward network in FP8, dense or of routed experts (DeepSeek-V3 §3.3).

What the backward pass keeps: the FP8 copy of the tokens, made before they are sent to the experts and as it
arrives there, and an FP8 copy of SwiGLU's input. SwiGLU and the experts' rows are computed again. Between
tokens and experts FP8 travels both ways: tokens forward, the gradients of the experts' outputs backward.
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.config import FP8Config
from dsv3_jax.precision import fp8
from pallas_kernels import Quantized, dequantize


@runtime_checkable
class Routes(Protocol):
    """Where copies of the tokens go: `parallel.dispatch.Dispatch`, or `parallel.exchange.Exchange`."""

    @property
    def group_sizes(self) -> Array:
        """Rows of each expert."""
        ...

    def send(self, x: Array, axis: int = 0) -> Array:
        """The tokens along `axis` that reach this device's experts."""
        ...

    def expand(self, x: Array, axis: int = 0) -> Array:
        """A row for every copy of those, sorted by expert."""
        ...

    def collect(self, rows: Array) -> Array:
        """The sum of each token's copies."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def ffn(
    x: Float[Array, "tokens d"],
    gates: Float[Array, " copies"] | None,
    gate_up: Float[Array, "*experts d two_f"],
    down: Float[Array, "*experts f d"],
    routes: Any,
    recipe: FP8Config,
    name: str,
) -> Float[Array, "tokens d"]:
    """`swiglu(x @ gate_up) @ down`; with routes the sum of that, times its gate, over each token's copies.

    Args:
      x: tokens.
      gates: of each sorted row; None without routes. They multiply the hidden activation.
      gate_up, down: float32 master weights.
      routes: `Routes`, where copies of the tokens go; None for a dense layer.
      recipe: the recipe.
      name: under which the remat policy knows what is kept of SwiGLU's input.
    """
    return _fwd(x, gates, gate_up, down, routes, recipe, name)[0]


def _fwd(x, gates, gate_up, down, routes, recipe: FP8Config, name):
    sizes = None if routes is None else routes.group_sizes
    x8 = fp8.activation(x, recipe, power_of_two=recipe.power_of_two and routes is not None)
    x8 = _mapped("send", x8, routes)
    hidden = fp8.product(
        _mapped("expand", x8, routes), fp8.weight(gate_up, recipe, transpose=True), sizes, recipe, x.dtype
    )
    kept = fp8.activation(hidden, recipe) if recipe.swiglu_input == "fp8" else hidden
    kept = jax.tree.map(lambda part: checkpoint_name(part, name), kept)
    act8 = fp8.activation(hidden, recipe, swiglu=True)
    if gates is not None:  # A gate is the same for a whole row: it goes into the scales, and costs nothing.
        act8 = Quantized(act8.values, act8.scales * gates)
    out = fp8.product(act8, fp8.weight(down, recipe, transpose=True), sizes, recipe, x.dtype)
    return _summed(out, routes), (x8, kept, gates, gate_up, down, routes)


def _bwd(recipe: FP8Config, name, saved, dy):
    del name
    x8, kept, gates, gate_up, down, routes = saved
    sizes = None if routes is None else routes.group_sizes
    # 1. The product with `down`. What was sent as FP8 exists as nothing else.
    dy8 = fp8.gradient(dy, recipe, power_of_two=recipe.power_of_two and routes is not None)
    dy8 = _mapped("expand", _mapped("send", dy8, routes), routes)
    dweighted = fp8.product(dy8, fp8.weight(down, recipe), sizes, recipe, dy.dtype)
    # 2. SwiGLU, computed again, and its gradient.
    hidden = dequantize(kept) if isinstance(kept, Quantized) else kept.astype(jnp.float32)
    weighted, dhidden, dgates = _swiglu_gradient(hidden, gates, dweighted)
    regrouped = recipe.power_of_two and routes is not None
    arrived = dy if routes is None else dy8
    ddown = fp8.weight_gradient(weighted, arrived, sizes, recipe, power_of_two=regrouped)
    # 3. The product with `gate_up`.
    drows = fp8.product(fp8.gradient(dhidden, recipe), fp8.weight(gate_up, recipe), sizes, recipe, dy.dtype)
    x8 = _mapped("expand", x8, routes)
    dgate_up = fp8.weight_gradient(x8, dhidden, sizes, recipe, power_of_two=regrouped)
    return _summed(drows, routes), dgates, dgate_up, ddown, None


ffn.defvjp(_fwd, _bwd)


def _swiglu_gradient(hidden, gates, dweighted):
    """What `down` multiplied, and the gradients of `hidden` and of the gates; float32 inside."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    g = dweighted.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    act, dgates = silu * up, None
    if gates is not None:
        dgates = jnp.sum(g * act, axis=-1)
        act, g = act * gates[:, None], g * gates[:, None]
    dgate = g * up * (sigmoid + silu * (1 - sigmoid))
    dhidden = jnp.concatenate([dgate, g * silu], axis=-1)
    return act.astype(dweighted.dtype), dhidden.astype(dweighted.dtype), dgates


def _mapped(what: str, x: Quantized, routes: Routes | None) -> Quantized:
    """FP8 numbers and their scales through one of the maps of `routes`."""
    if routes is None:
        return x
    function = getattr(routes, what)
    return Quantized(function(x.values), function(x.scales, axis=1))


def _summed(rows, routes: Routes | None):
    """The sum of each token's copies, in float32."""
    return rows if routes is None else routes.collect(rows)

"""The routed experts: their products on the rows that a route brings, on one device or over a mesh axis.

Token copies are sorted by expert, so that each expert's rows are consecutive, multiplied group by group,
and put back (`parallel.dispatch`). With experts on other devices the rows come from there and go back
(`parallel.exchange`); what lies between is the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax import precision
from dsv3_jax.config import FP8Config
from dsv3_jax.model.layers import recompute, swiglu
from dsv3_jax.parallel.dispatch import Dispatch, combine, dispatch, plan, sort_gates
from dsv3_jax.parallel.exchange import Exchange, Rounds, capacity, exchange, rounds
from dsv3_jax.parallel.gather import whole
from dsv3_jax.parallel.mesh import current_mesh, expert_layout, expert_wire, spec
from dsv3_jax.parallel.transport import Wire
from pallas_kernels import grouped_matmul


@recompute
def _weigh(hidden: Float[Array, "copies two_f"], gates: Float[Array, " copies"]) -> Float[Array, "copies f"]:
    """The activations of each row times its gate, the product in float32."""
    return (swiglu(hidden).astype(jnp.float32) * gates[:, None]).astype(hidden.dtype)


def experts_on_rows(
    x: Float[Array, "tokens d"],
    indices: Int[Array, "tokens top_k"],
    gates: Float[Array, "tokens top_k"],
    gate_up: Float[Array, "experts d two_f"],
    down: Float[Array, "experts f d"],
    implementation: str,
    recipe: FP8Config | None = None,
) -> Float[Array, "tokens d"]:
    """sum_i g_i FFN_i(x) over the selected experts (V3 eq 12), all of them here, in the dtype of x."""
    return _along(plan(indices, gate_up.shape[0]), x, gates, gate_up, down, implementation, recipe)


def _along(
    to: Dispatch | Exchange,
    x: Float[Array, "tokens d"],
    gates: Float[Array, "tokens top_k"],
    gate_up: Float[Array, "experts d two_f"],
    down: Float[Array, "experts f d"],
    implementation: str,
    recipe: FP8Config | None,
) -> Float[Array, "tokens d"]:
    """The experts' products on the rows of a route.

    The gate multiplies the hidden activation and not the output: the same sum, and the backward
    pass need not keep the outputs of the experts.
    """
    if recipe is not None:
        return precision.ffn(x, sort_gates(gates, to), gate_up, down, to, recipe, "expert_gate_up")
    rows = dispatch(x, to)
    with jax.named_scope("expert_gate_up"):
        hidden = grouped_matmul(rows, gate_up.astype(x.dtype), to.group_sizes, implementation=implementation)
    hidden = checkpoint_name(hidden, "expert_gate_up")
    weighted = _weigh(hidden, sort_gates(gates, to))
    with jax.named_scope("expert_down"):
        out = grouped_matmul(weighted, down.astype(x.dtype), to.group_sizes, implementation=implementation)
    return combine(out, to)


class _Settings(NamedTuple):
    wire: Wire
    groups: tuple[int, int]
    implementation: str
    recipe: FP8Config | None


def experts_over_ranks(
    x: Float[Array, "tokens d"],
    indices: Int[Array, "tokens top_k"],
    gates: Float[Array, "tokens top_k"],
    gate_up: Float[Array, "experts_here d two_f"],
    down: Float[Array, "experts_here f d"],
    wire: Wire,
    implementation: str,
    recipe: FP8Config | None = None,
    groups: tuple[int, int] = (1, 1),
) -> Float[Array, "tokens d"]:
    """`experts_on_rows` where each rank of a mesh axis holds its consecutive part of the experts.

    Runs inside a `shard_map` over at least `wire.axis`, on every rank of it together: each sends its own
    tokens to the ranks of their experts and gets back the sums. `groups` as of `exchange.capacity`. The
    gradients of the weights are those of this rank's experts from the tokens of all ranks of the axis.
    """
    settings = _Settings(wire, groups, implementation, recipe)
    return _in_rounds(x, gates, gate_up, down, indices, settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _in_rounds(x, gates, gate_up, down, indices, settings: _Settings):
    return _in_rounds_fwd(x, gates, gate_up, down, indices, settings)[0]


def _in_rounds_fwd(x, gates, gate_up, down, indices, settings: _Settings):
    """The first round as any other function; the backward pass of more rounds computes them again."""
    when, route = _routes(indices, gate_up.shape[0], settings)
    operands = (x, gates, gate_up, down)
    y, back = jax.vjp(functools.partial(_one, route(0), settings), *operands)
    y = _further(when, y, lambda number: _one(route(number), settings, *operands))
    return y, (back, operands if when is not None else None, indices)


def _in_rounds_bwd(settings: _Settings, saved, dy):
    back, operands, indices = saved
    gradients = back(dy)
    if operands is not None:
        when, route = _routes(indices, operands[2].shape[0], settings)

        def again(number):
            return jax.vjp(functools.partial(_one, route(number), settings), *operands)[1](dy)

        gradients = _further(when, gradients, again)
    return *gradients, None


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)


def _one(to: Exchange, settings: _Settings, x: Array, gates: Array, gate_up: Array, down: Array) -> Array:
    return _along(to, x, gates, gate_up, down, settings.implementation, settings.recipe)


def _routes(indices, experts_here: int, settings: _Settings) -> tuple[Rounds | None, Callable[..., Exchange]]:
    """(when tokens travel, None if one round always does; the route of a round by its number)."""
    wire, n_experts = settings.wire, experts_here * settings.wire.ranks
    tokens, top_k = indices.shape
    room = capacity(tokens, top_k, n_experts, wire, settings.groups)
    when = rounds(indices, n_experts, wire, room)
    route = functools.partial(exchange, indices, n_experts, wire, room, when)
    return (when if room.rounds > 1 else None), route


def _further(when: Rounds | None, first: Any, one: Callable[..., Any]) -> Any:
    """`first` plus what the rounds after the first one give; mostly there are none."""
    if when is None:
        return first

    def body(state):
        number, total = state
        return number + 1, jax.tree.map(jnp.add, total, one(number))

    return jax.lax.while_loop(lambda state: state[0] < when.needed, body, (jnp.int32(1), first))[1]


def routed_experts(
    u: Float[Array, "batch seq d"],
    indices: Int[Array, "batch seq top_k"],
    gates: Float[Array, "batch seq top_k"],
    gate_up: Float[Array, "experts d two_f"],
    down: Float[Array, "experts f d"],
    implementation: str,
    recipe: FP8Config | None = None,
    groups: tuple[int, int] = (1, 1),
) -> Float[Array, "batch seq d"]:
    """The routed experts for a batch, laid out as the surrounding `use_mesh` says.

    Under a mesh each device serves its own part of the batch, with the experts of its rank of `expert`. In a
    region that is manual already, arrays are one device's: its tokens, and its part of the experts.
    """
    wire = expert_wire()

    def local(u, indices, gates, gate_up, down):
        x, to, weights = (part.reshape(-1, part.shape[-1]) for part in (u, indices, gates))
        if wire is None:
            out = experts_on_rows(x, to, weights, gate_up, down, implementation, recipe)
        else:
            out = experts_over_ranks(x, to, weights, gate_up, down, wire, implementation, recipe, groups)
        return out.reshape(u.shape)

    mesh = current_mesh()
    if mesh is None:
        return local(u, indices, gates, gate_up, down)
    batch, layouts = spec("batch"), (expert_layout(gate_up.shape), expert_layout(down.shape))
    # FP8 takes its scales from the float32 weights.
    dtype = u.dtype if recipe is None else gate_up.dtype

    def gathered(u, indices, gates, *parts):
        weights = (whole(part, layout, dtype) for part, layout in zip(parts, layouts, strict=True))
        return local(u, indices, gates, *weights)

    # Where devices hold the same experts, shard_map's transpose sums their weight gradients.
    in_specs = (batch, batch, batch, *(layout.spec for layout in layouts))
    mapped = jax.shard_map(gathered, mesh=mesh, in_specs=in_specs, out_specs=batch, check_vma=False)
    return mapped(u, indices, gates, gate_up, down)

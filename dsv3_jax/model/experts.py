"""Dropless dispatch to the routed experts and the combination of what they return.

Token copies are sorted by expert, so that each expert's rows are consecutive, multiplied group by group,
and put back. Both permutations are gathers in the forward and in the backward pass: a scatter-add
would serialise on most hardware.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax import precision
from dsv3_jax.config import FP8Config
from dsv3_jax.model.layers import recompute, swiglu
from dsv3_jax.parallel.mesh import current_mesh, spec
from pallas_kernels import grouped_matmul


class Dispatch(NamedTuple):
    """How copies are laid out by expert; a copy is one of the `tokens * top_k` (token, choice) pairs."""

    order: Int[Array, " copies"]  # The copy in each sorted row.
    row: Int[Array, "tokens top_k"]  # The sorted row of each copy: the inverse of `order`.
    group_sizes: Int[Array, " experts"]


def plan(indices: Int[Array, "tokens top_k"], n_experts: int) -> Dispatch:
    """Sorts the copies by expert, stably: a token's order within an expert is its order in the batch."""
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.zeros(n_experts, jnp.int32).at[flat].add(1)
    return Dispatch(order, row.reshape(indices.shape), sizes)


@jax.custom_vjp
def dispatch(x: Float[Array, "tokens d"], to: Dispatch) -> Float[Array, "copies d"]:
    """A row for every copy, sorted by expert."""
    return x[to.order // to.row.shape[1]]


def _dispatch_fwd(x, to):
    return dispatch(x, to), to


def _dispatch_bwd(to, drows):
    return drows[to.row].astype(jnp.float32).sum(1).astype(drows.dtype), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(rows: Float[Array, "copies d"], to: Dispatch) -> Float[Array, "tokens d"]:
    """The sum of each token's copies, accumulated in float32."""
    return rows[to.row].astype(jnp.float32).sum(1).astype(rows.dtype)


def _combine_fwd(rows, to):
    return combine(rows, to), to


def _combine_bwd(to, dy):
    return dy[to.order // to.row.shape[1]], None


combine.defvjp(_combine_fwd, _combine_bwd)


@jax.custom_vjp
def sort_gates(gates: Float[Array, "tokens top_k"], to: Dispatch) -> Float[Array, " copies"]:
    """The gate of each sorted row."""
    return gates.reshape(-1)[to.order]


def _sort_gates_fwd(gates, to):
    return sort_gates(gates, to), to


def _sort_gates_bwd(to, dsorted):
    return dsorted[to.row], None


sort_gates.defvjp(_sort_gates_fwd, _sort_gates_bwd)


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
    """sum_i g_i FFN_i(x) over the selected experts (V3 eq 12), on one device, in the dtype of x.

    The gate multiplies the hidden activation and not the output: the same sum, and the backward
    pass need not keep the outputs of the experts.
    """
    to = plan(indices, gate_up.shape[0])
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


def routed_experts(
    u: Float[Array, "batch seq d"],
    indices: Int[Array, "batch seq top_k"],
    gates: Float[Array, "batch seq top_k"],
    gate_up: Float[Array, "experts d two_f"],
    down: Float[Array, "experts f d"],
    implementation: str,
    recipe: FP8Config | None = None,
) -> Float[Array, "batch seq d"]:
    """`experts_on_rows` for a batch; under a mesh each device serves its own part of the batch."""

    def local(u, indices, gates, gate_up, down):
        x, to, weights = (part.reshape(-1, part.shape[-1]) for part in (u, indices, gates))
        return experts_on_rows(x, to, weights, gate_up, down, implementation, recipe).reshape(u.shape)

    mesh = current_mesh()
    if mesh is None:
        return local(u, indices, gates, gate_up, down)
    # Weights come in whole: every device multiplies by all experts, and shard_map's transpose sums
    # the weight gradients over the devices.
    batch, whole = spec("batch"), spec()
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(batch, batch, batch, whole, whole), out_specs=batch, check_vma=False
    )
    return mapped(u, indices, gates, gate_up, down)

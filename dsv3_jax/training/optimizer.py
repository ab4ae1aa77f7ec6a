"""AdamW (arXiv 1711.05101) with global clipping, decoupled decay and moments in fp32 or bf16.

The arithmetic is that of `optax.adamw` and the state is optax's. One function updates a leaf's moments
and parameter together, so that every output can overwrite its input, and a step that is not finite is
undone inside it. Selecting old or new state around a chain of optax transformations costs XLA:CPU a copy
of the moments and half the speed; on an H200 both take the same memory and time. Moments in host memory
visit the device in blocks (`training.visits`), between the backward pass and the next step: they need the
norm of all gradients. Fetching them earlier takes as much memory as keeping them, so a share may stay
(`OptimizerConfig.host_share`).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.parallel.mesh import current_mesh
from dsv3_jax.training import visits

Params = Any  # A nested dict of fp32 arrays: Flax's "params" collection.

NORM_PARAMETER = "scale"
EMBEDDING_PARAMETER = "embedding"


def init(params: Params, config: OptimizerConfig) -> optax.ScaleByAdamState:
    """Zero moments of `moment_dtype`, in the tree of `params`, and an int32 count of updates."""
    dtype = jnp.dtype(config.moment_dtype)

    def zeros() -> Params:
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)

    return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros(), nu=zeros())


def decay_mask(params: Params, decay_embeddings: bool) -> Params:
    """A tree of bools: which parameters decay. All but the scales of norms and, by option, embeddings.

    Decided by the parameter's name: scanned layers stack their norms' scales into matrices, so the number
    of dimensions says nothing.
    """
    exempt = {NORM_PARAMETER} if decay_embeddings else {NORM_PARAMETER, EMBEDDING_PARAMETER}

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return names[-1] not in exempt

    return jax.tree_util.tree_map_with_path(decays, params)


def in_host_memory(params: Params, config: OptimizerConfig) -> Params:
    """A tree of bools: whose moments are in host memory, given parameters or their shapes.

    The largest arrays', at least `host_share` of all. Small ones stay: outside a loop over layers they
    would come in whole and only then leave.
    """
    leaves, tree = jax.tree.flatten(params)
    if config.memory != "host":
        return tree.unflatten([False] * len(leaves))
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    ascending = sorted(range(len(sizes)), key=sizes.__getitem__)
    room = (1 - config.host_share) * sum(sizes)
    kept = sum(total <= room for total in itertools.accumulate(sizes[k] for k in ascending))
    away = set(ascending[kept:])
    return tree.unflatten([k in away for k in range(len(sizes))])


def norm_and_clip_scale(grads: Params, clip_norm: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The global L2 norm of `grads` in fp32, and the factor that brings it down to `clip_norm`.

    A `clip_norm` of 0 clips nothing. The norm is not finite if any gradient is not.
    """
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
    norm = jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
    if clip_norm <= 0:
        return norm, jnp.ones((), jnp.float32)
    return norm, jnp.where(norm > clip_norm, clip_norm / norm, 1.0)


def adamw_update(
    params: Params,
    grads: Params,
    state: optax.ScaleByAdamState,
    learning_rate: Float[Array, ""] | float,
    clip_scale: Float[Array, ""] | float,
    config: OptimizerConfig,
    finite: Bool[Array, ""] | bool = True,
) -> tuple[Params, optax.ScaleByAdamState]:
    """One AdamW step: `(params, state)` after it.

    Gradients are multiplied by `clip_scale` first (see `norm_and_clip_scale`). Arithmetic is in fp32;
    moments are rounded to `moment_dtype` only where they are stored, after the step has used them.
    Where `finite` is false, parameters, moments and count come back unchanged, whatever `grads` holds.
    """
    count = optax.safe_increment(state.count)
    correction1 = 1 - jnp.float32(config.b1) ** count
    correction2 = 1 - jnp.float32(config.b2) ** count
    dtype = jnp.dtype(config.moment_dtype)

    def first(g: Array, mu: Array) -> Array:
        new_mu = config.b1 * mu.astype(jnp.float32) + (1 - config.b1) * (g.astype(jnp.float32) * clip_scale)
        # The parameter reads the moments after the select: reading the values before it would keep the
        # old moments alive, and with them a second copy of every moment.
        return jnp.where(finite, new_mu, mu.astype(jnp.float32))

    def leaf(p: Array, g: Array, mu: Array, nu: Array, decays: bool) -> tuple[Array, Array, Array]:
        new_mu = first(g, mu)
        g = g.astype(jnp.float32) * clip_scale
        new_nu = config.b2 * nu.astype(jnp.float32) + (1 - config.b2) * g * g
        new_nu = jnp.where(finite, new_nu, nu.astype(jnp.float32))
        update = (new_mu / correction1) / (jnp.sqrt(new_nu / correction2) + config.eps)
        if decays:
            update += config.weight_decay * p
        new_p = jnp.where(finite, p - learning_rate * update, p)
        return new_p, new_mu.astype(dtype), new_nu.astype(dtype)

    with jax.named_scope("adamw"):
        mask = decay_mask(params, config.decay_embeddings)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        rows = list(zip(*map(jax.tree.leaves, (params, grads, state.mu, state.nu, mask)), strict=True))
        layers = [len(row[0]) if _stacked(path) else 1 for path, row in zip(paths, rows, strict=True)]
        away = jax.tree.leaves(in_host_memory(params, config))
        guests = [(row, n) for row, n, there in zip(rows, layers, away, strict=True) if there]
        visited = iter(_visiting(lambda g, mu: first(g, mu).astype(dtype), leaf, guests))
        updated = [next(visited) if there else leaf(*row) for row, there in zip(rows, away, strict=True)]
        params, mu, nu = map(jax.tree.structure(params).unflatten, zip(*updated, strict=True))
    count = jnp.where(finite, count, state.count)
    return params, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)


def _stacked(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at this path has a leading axis of layers."""
    return any(str(getattr(key, "key", "")).endswith("_layers") for key in path)


def _visiting(
    first: Callable[[Array, Array], Array],
    leaf: Callable[..., tuple[Array, Array, Array]],
    guests: list[tuple[tuple[Any, ...], int]],
) -> list[tuple[Array, Array, Array]]:
    """`leaf` of rows (p, g, mu, nu, decays), each with its layers, whose moments stay in host memory.

    Stacked ones visit layer by layer, so that the device has room for few of them. The first moment needs the
    gradient alone (`first`): while it leaves, the second arrives.
    """
    updated: dict[int, tuple[Array, Array, Array]] = {}
    rows, layers, on_mesh = [row for row, _ in guests], [n for _, n in guests], current_mesh() is not None
    for count in sorted(set(layers)):
        chosen = [number for number, n in enumerate(layers) if n == count]
        chosen.sort(key=lambda number: -rows[number][0].size)
        cuts = [visits.blocks(rows[number][2], count, on_mesh) for number in chosen]
        decays = [rows[number][4] for number in chosen]
        p, g, mu, nu = (
            [visits.cut(rows[number][column], n) for number, n in zip(chosen, cuts, strict=True)]
            for column in range(4)
        )

        def visit(turn: visits.Turn, state, g=g, decays=decays, cuts=cuts):
            (p, mu, nu), last = map(list, state), -1
            for k, of in enumerate(cuts):
                for block in range(of):
                    at = block, of
                    gradient, old = turn.take(g[k], *at), turn.arrive(mu[k], *at)
                    mu[k] = turn.leave(mu[k], first(gradient, old), *at)
                    if last >= 0:  # What the last block's parameters need goes, before more comes.
                        p[last], nu[k] = lax.optimization_barrier((p[last], nu[k]))
                    there, last = turn.arrive(nu[k], *at), k
                    new_p, _, new_nu = leaf(turn.take(p[k], *at), gradient, old, there, decays[k])
                    nu[k] = turn.leave(nu[k], new_nu, *at)
                    p[k] = turn.put(p[k], new_p, *at)
            return p, mu, nu

        found = visits.in_turns(count, (p, mu, nu), visit)
        for number, *new in zip(chosen, *found, strict=True):
            shape = rows[number][0].shape
            updated[number] = new[0].reshape(shape), new[1].reshape(shape), new[2].reshape(shape)
    return [updated[number] for number in range(len(rows))]

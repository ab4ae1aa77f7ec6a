"""Everything that a training step carries: its shapes, its layout on the mesh, its first values."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.parallel.mesh import replicated, splits, state_shardings
from dsv3_jax.pipeline.layout import over_pipe
from dsv3_jax.training import optimizer
from dsv3_jax.training.ema import HOST


class TrainState(NamedTuple):
    """The state of training. The step is a pure function from one to the next."""

    params: Any  # Flax's "params" collection, float32.
    router: Any  # The router bias of every MoE layer, float32: not a parameter.
    optimizer: optax.ScaleByAdamState


def make_model(config: Config) -> Transformer:
    """The model of a run, with its precision and remat policy."""
    precision = config.train.precision
    dtype = jnp.float32 if precision == "fp32" else jnp.bfloat16
    recipe = config.fp8 if precision == "fp8" else None
    return Transformer(config.model, dtype, config.train.remat, recipe)


def _init(config: Config, rng: jax.Array) -> TrainState:
    variables = init_variables(make_model(config), rng)
    params = meta.unbox(variables["params"])
    return TrainState(params, variables.get("router", {}), optimizer.init(params, config.optimizer))


@functools.lru_cache(maxsize=8)  # Tracing the model takes half a second, and a start asks four times.
def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """The state's ShapeDtypeStructs, each with its sharding on `mesh`; nothing is computed."""
    rng = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    boxed = jax.eval_shape(lambda key: init_variables(make_model(config), key)["params"], rng)
    shapes = jax.eval_shape(lambda key: _init(config, key), rng)
    by_name = config.mesh.sharding
    moments = state_shardings(boxed, mesh, lambda _: by_name in ("zero1", "fsdp"))
    scalar: Any = replicated(mesh)
    layout = TrainState(
        params=state_shardings(boxed, mesh, functools.partial(splits, by_name)),
        router=jax.tree.map(lambda _: replicated(mesh), shapes.router),
        optimizer=optax.ScaleByAdamState(count=scalar, mu=moments, nu=moments),
    )
    layout = over_pipe(layout, shapes, mesh)
    moments = jax.tree.map(
        lambda sharding, away: sharding.with_memory_kind(HOST) if away else sharding,
        layout.optimizer.mu,
        optimizer.in_host_memory(shapes.params, config.optimizer),
    )
    layout = layout._replace(optimizer=layout.optimizer._replace(mu=moments, nu=moments))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        layout,
    )


def shardings(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """The first state, from `train.seed`, computed where it will live."""
    # Run once: on CPU, optimising this program takes LLVM far longer than running it as it is.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    make = jax.jit(
        lambda rng: _init(config, rng),
        out_shardings=shardings(abstract_state(config, mesh)),
        compiler_options=quick if mesh.devices.flat[0].platform == "cpu" else None,
    )
    return make(jax.random.key(config.train.seed))


def parameter_count(params: Any) -> int:
    """Parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

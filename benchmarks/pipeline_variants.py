"""The runs that `pipeline_gpu.py` compares, their weights, tokens, programs and planned memory.

JAX is imported where it is used: the process that starts the runs holds no device.
"""

import dataclasses
import time
from typing import Any

VARIANTS = {  # Pipeline, (pipe, data, expert).
    "data": ("", (1, 2, 1)),
    "1f1b": ("1f1b", (2, 1, 1)),
    "dualpipe": ("dualpipe", (2, 1, 1)),
    "zb1p": ("zb1p", (2, 1, 1)),
    "expert": ("", (1, 1, 2)),
    "overlap": ("dualpipev", (1, 1, 2)),
}


def variant_of(config, name, n_micro, sequences):
    """The run of a variant: `n_micro * sequences` a step, `sequences` at once on a device."""
    pipeline, (pipe, data, expert) = VARIANTS[name]
    rows, micro = sequences * n_micro, sequences * data * expert
    mesh = dataclasses.replace(config.mesh, pipe=pipe, data=data, expert=expert)
    train = dataclasses.replace(config.train, pipeline=pipeline, batch_size=rows, micro_batch_size=micro)
    return dataclasses.replace(config, mesh=mesh, train=train)


def random_state(config, mesh):
    """Weights of the run's deviation, norms of one, moments of zero; cheap to compile."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.training.state import abstract_state, shardings

    abstract = abstract_state(config, mesh)

    def draw(path, leaf):
        where = jax.tree_util.keystr(path)
        if "scale" in where and "params" in where:
            return jnp.ones(leaf.shape, leaf.dtype)
        if "params" not in where:
            return jnp.zeros(leaf.shape, leaf.dtype)
        key = jax.random.key(len(where), impl="rbg")
        return config.model.init_std * jax.random.normal(key, leaf.shape, leaf.dtype)

    make = jax.jit(
        lambda: jax.tree_util.tree_map_with_path(draw, abstract), out_shardings=shardings(abstract)
    )
    return make()


def random_batch(config, mesh):
    import jax
    import numpy as np

    from dsv3_jax.training.step import batch_sharding

    train = config.train
    rng = np.random.default_rng(0)
    shape = train.batch_size, train.seq_len + 1
    tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    rows = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(train.seq_len, dtype=np.int32), tokens[:, 1:].shape),
        "segment_ids": np.ones_like(tokens[:, 1:]),
        "loss_mask": np.ones(tokens[:, 1:].shape, bool),
    }
    cut = -1, train.micro_batch_size, train.seq_len
    return {name: jax.device_put(x.reshape(cut), batch_sharding(mesh)) for name, x in rows.items()}


def compiled(config, mesh):
    """The step, its rates, and the seconds of tracing and compiling."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.training.state import abstract_state
    from dsv3_jax.training.step import Schedules, batch_sharding, make_train_step

    train = config.train
    shape = train.batch_size // train.micro_batch_size, train.micro_batch_size, train.seq_len
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in (dtypes | {"loss_mask": jnp.bool_}).items()
    }
    rates = Schedules(*(jnp.float32(x) for x in (1e-4, 1e-3, 0.3)))
    start = time.perf_counter()
    step: Any = make_train_step(config, mesh)
    lowered = step.lower(abstract_state(config, mesh), batch, np.int32(shape[0]), rates)
    traced = time.perf_counter()
    return lowered.compile(), rates, {"trace": traced - start, "compile": time.perf_counter() - traced}


def counted_memory(config, mesh) -> dict[str, float]:
    """GiB that a device holds at the peak, as the planner counts."""
    import jax

    from dsv3_jax.planning import memory, stages
    from dsv3_jax.planning.shapes import Split

    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    if config.train.pipeline:
        found = stages.of_rank(config, mesh, platform)
    else:
        split = Split(mesh.shape["data"], mesh.shape["expert"], config.mesh.sharding)
        found = memory.of_step(config, split, platform)
    return {name: size / 2**30 for name, size in found._asdict().items()}

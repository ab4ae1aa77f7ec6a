"""Parameters put together from their parts: the values, and what happens to their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from dsv3_jax.parallel.gather import whole
from dsv3_jax.parallel.mesh import expert_layout, make_mesh, use_mesh
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import Schedules, make_train_step

# Experts that the replicas divide are split as experts, others along their rows.
SHAPES = {
    (8, 3, 2): (("expert", "data"), None, None),
    (2, 4, 3): ("expert", "data", None),
    (2, 3, 5): ("expert", None, None),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_put_together_and_gradients_are_summed_in_float32(shape):
    options = MeshConfig(data=4, expert=2, sharding="fsdp")
    mesh = make_mesh(options)
    with use_mesh(mesh, options):
        layout = expert_layout(shape)
    assert layout.spec == P(*SHAPES[shape])

    # What the replicas multiply with: 259 is no bfloat16 number.
    factors = np.repeat(np.float32([[256], [1], [1], [1]]), 2, axis=0)
    batch = P(("data", "expert"))

    def local(factor, part):
        w = whole(part, layout, jnp.bfloat16)
        return factor * w.astype(jnp.float32).sum(), w[None].astype(jnp.float32)

    def outputs(w):
        specs = dict(in_specs=(batch, layout.spec), out_specs=(batch, P("data", "expert")))
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(factors, w)

    w = np.random.default_rng(0).integers(-8, 8, shape).astype(np.float32)
    gradient, (_, copies) = jax.jit(jax.grad(lambda w: (outputs(w)[0].sum(), outputs(w)), has_aux=True))(w)
    for copy in np.asarray(copies):
        np.testing.assert_array_equal(copy, w)
    np.testing.assert_array_equal(gradient, np.full(shape, 259))


@pytest.mark.parametrize("remat", ["dots", "v3"])
def test_zero1_gathers_once_and_fsdp_again_for_the_backward_pass(remat):
    moe = MoEConfig(n_dense_layers=0, n_experts=4, top_k=2, d_ff_expert=8)
    model = ModelConfig(vocab_size=16, d_model=8, n_layers=2, moe=moe, attention=AttentionConfig(kind="mqa"))
    gathers = {}
    for sharding in ("zero1", "fsdp"):
        config = Config(
            model=model,
            train=TrainConfig(precision="bf16", remat=remat, seq_len=8, batch_size=2),
            mesh=MeshConfig(data=2, expert=1, sharding=sharding),
        )
        mesh = make_mesh(config.mesh)
        shape = jax.ShapeDtypeStruct((1, 2, 8), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), shape)
        batch["loss_mask"] = jax.ShapeDtypeStruct(shape.shape, jnp.bool_)
        step, count = make_train_step(config, mesh), jax.ShapeDtypeStruct((), jnp.int32)
        program = step.trace(abstract_state(config, mesh), batch, count, Schedules(1e-3, 0.0, 0.0)).jaxpr
        # Both matrices of the one layer that is scanned.
        gathers[sharding] = str(program).count(" = all_gather[")
    assert gathers == {"zero1": 2, "fsdp": 4}

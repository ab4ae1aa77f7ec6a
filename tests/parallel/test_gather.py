"""Parameters put together from their parts: the values, and what happens to their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.gather import whole
from dsv3_jax.parallel.mesh import expert_layout, make_mesh, use_mesh

# Experts that the replicas divide are split as experts, others along their rows.
SHAPES = {(8, 3, 2): P(("expert", "data")), (2, 4, 3): P("expert", "data"), (2, 3, 5): P("expert")}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_put_together_and_gradients_are_summed_in_float32(shape):
    options = MeshConfig(data=4, expert=2, sharding="fsdp")
    mesh = make_mesh(options)
    with use_mesh(mesh, options):
        layout = expert_layout(shape)
    assert P(*layout, *[None] * (3 - len(layout))) == P(*SHAPES[shape], *[None] * (3 - len(SHAPES[shape])))

    # What the replicas multiply with: 259 is no bfloat16 number.
    factors = np.repeat(np.float32([[256], [1], [1], [1]]), 2, axis=0)
    batch = P(("data", "expert"))

    def local(factor, part):
        w = whole(part, layout, jnp.bfloat16)
        return factor * w.astype(jnp.float32).sum(), w[None].astype(jnp.float32)

    def outputs(w):
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(batch, layout), out_specs=(batch, P("data", "expert")), check_vma=False
        )
        return mapped(factors, w)

    w = np.random.default_rng(0).integers(-8, 8, shape).astype(np.float32)
    gradient, (_, copies) = jax.jit(jax.grad(lambda w: (outputs(w)[0].sum(), outputs(w)), has_aux=True))(w)
    for copy in np.asarray(copies):
        np.testing.assert_array_equal(copy, w)
    np.testing.assert_array_equal(gradient, np.full(shape, 259))

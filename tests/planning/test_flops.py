"""The planner's FLOPs against the products that stand in the traced program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from planned import CONFIG, run

from dsv3_jax.config import AttentionConfig
from dsv3_jax.model import forward as run_model
from dsv3_jax.model import init_variables
from dsv3_jax.planning import flops
from dsv3_jax.planning.shapes import parameter_shapes
from dsv3_jax.training.losses import losses
from dsv3_jax.training.state import make_model

SEQ = CONFIG.train.seq_len


def products(jaxpr: Jaxpr) -> dict[str, float]:
    """FLOPs of the matrix products in a program and what it calls, loops unrolled: dense and grouped."""
    found = {"dense": 0.0, "grouped": 0.0}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contract, _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract[0])
            found["dense"] += 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
        if eqn.primitive.name.startswith("ragged_dot"):
            # Each row meets one matrix: all sizes but the groups', each once, also in gradients.
            arrays = (*eqn.invars[:2], eqn.outvars[0])
            sizes = {size for x in arrays for size in x.aval.shape} - {CONFIG.model.moe.n_experts}
            found["grouped"] += 2.0 * math.prod(sizes)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                inner = products(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
                found = {kind: found[kind] + times * inner[kind] for kind in found}
    return found


def traced(config, gradient: bool) -> dict[str, float]:
    """Products of a forward pass, or of the gradient of the loss, on one sequence."""
    model = make_model(config)
    params = parameter_shapes(config)
    rng = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    tokens = jax.ShapeDtypeStruct((1, SEQ), jnp.int32)
    router = jax.eval_shape(lambda key: init_variables(model, key)["router"], rng)

    def loss(params, router, tokens):
        outputs = run_model(model, {"params": params, "router": router}, tokens, None, None, tokens)
        mask = jnp.ones((1, SEQ), bool)
        batch = {"targets": tokens, "loss_mask": mask, "segment_ids": tokens}
        return losses(outputs, batch, jnp.ones(2), 1.0, jnp.float32(0.3), 0).loss

    function = jax.grad(loss) if gradient else loss
    return products(jax.make_jaxpr(function)(params, router, tokens).jaxpr)


def test_forward():
    """Every product of the forward pass, by parts; the plain attention computes the whole square."""
    found = traced(CONFIG, gradient=False)
    counted = flops.forward(CONFIG.model, SEQ)
    assert found["grouped"] / SEQ == pytest.approx(counted.expert_up + counted.expert_down)
    dense = sum(counted) + counted.attention - counted.expert_up - counted.expert_down
    assert found["dense"] / SEQ == pytest.approx(dense)


@pytest.mark.parametrize("remat", ["none", "dots", "v3", "full"])
def test_training(remat):
    """Three times the forward pass, and what the policy computes again; the plain attention has no kernel."""
    found = traced(run(remat), gradient=True)
    once = flops.forward(CONFIG.model, SEQ)
    total = 3 * (sum(once) + once.attention) + flops.recomputed(once, remat)
    qk, v = flops.widths(CONFIG.model.attention)
    square = {
        "none": 0,
        "dots": 1,
        "v3": 2 * qk / (qk + v),
        "full": 1,
    }  # The other half, or the scores of both.
    assert sum(found.values()) / SEQ == pytest.approx(total + square[remat] * once.attention)


def test_attention_kernels_compute_the_scores_again():
    """FlashAttention-2's backward pass is 5 products where the forward pass has 2."""
    model = dataclasses.replace(CONFIG.model, attention=AttentionConfig(kind="mha", n_heads=2, head_dim=16))
    once = flops.forward(model, SEQ)
    assert flops.attention_backward(model, once, "gpu") == pytest.approx(0.5 * once.attention)
    assert flops.attention_backward(model, once, "tpu") == pytest.approx(1.5 * once.attention)

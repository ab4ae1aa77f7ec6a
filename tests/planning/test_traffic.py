"""What devices send, by hand and as it stands in the traced program; links, and the roofline over them."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from planned import CONFIG, run

from dsv3_jax.planning import parse_topology, roofline, traffic
from dsv3_jax.planning.shapes import Split, parameter_shapes, parts, stand_in_mesh
from dsv3_jax.training.state import abstract_state
from dsv3_jax.training.step import Schedules, train_step


def by_name(config, split, topology="h100:1x8"):
    moved = traffic.of_step(config, split, parse_topology(topology))
    return {(t.what.split()[0], t.axis): t for t in moved}


def test_replicas_add_up_their_gradients():
    """A ring's all-reduce sends 2 (n-1)/n of the parameters, in the compute dtype, a micro-batch."""
    config = run(data=8, micro_batch_size=8, batch_size=16)
    (found,) = by_name(config, Split(8, 1, "replicated")).values()
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
    assert found.size == pytest.approx(2 * 2 * 7 / 8 * 4 * size)


def test_fsdp_gathers_twice_and_scatters_once():
    config = run(data=8, sharding="fsdp")
    found = by_name(config, Split(8, 1, "fsdp"))
    size = sum(part.whole for part in parts(config, Split(8, 1, "fsdp")).values())
    assert found["reduce-scatter", "data"].size == pytest.approx(7 / 8 * 4 * size)
    assert found["all-gather", "data"].size == pytest.approx(2 * 7 / 8 * 4 * size)


def test_zero1_gathers_experts_for_each_micro_batch_and_the_rest_once():
    config = run(data=8, sharding="zero1", precision="bf16", micro_batch_size=8, batch_size=16)
    held = parts(config, Split(8, 1, "zero1"))
    experts = held["experts"].whole
    rest = sum(part.whole for part in held.values()) - experts
    found = by_name(config, Split(8, 1, "zero1"))
    assert found["all-gather", "data"].size == pytest.approx(7 / 8 * (2 * 2 * experts + 4 * rest))
    # Gradients of experts travel in float32, all others in bfloat16.
    assert found["reduce-scatter", "data"].size == pytest.approx(7 / 8 * 2 * (4 * experts + 2 * rest))


def test_bytes_by_precision():
    """In bf16 the gradients of what is not an expert travel in bf16; in FP8 kernels are given float32."""
    split = Split(8, 1, "zero1")
    held = parts(run(data=8), split)
    experts = held["experts"].whole
    rest = sum(part.whole for part in held.values()) - experts
    for precision, width in (("bf16", 2), ("fp8", 4)):
        found = by_name(run(data=8, sharding="zero1", precision=precision), split)
        assert found["reduce-scatter", "data"].size == pytest.approx(7 / 8 * (4 * experts + width * rest))
        assert found["all-gather", "data"].size == pytest.approx(7 / 8 * (width * experts + 4 * rest))


def test_one_device_sends_nothing():
    assert by_name(run(), Split(1, 1, "replicated"), "h200:1") == {}


def sent_rows(jaxpr: Jaxpr) -> float:
    """Bytes in the all-to-alls of rows as wide as the model, loops unrolled."""
    total = 0.0
    for eqn in jaxpr.eqns:
        shape = eqn.invars[0].aval.shape if eqn.invars else ()
        if eqn.primitive.name == "all_to_all" and shape[-1:] == (CONFIG.model.d_model,):
            total += math.prod(shape) * 4
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "while":  # Further rounds of a skewed load.
            continue
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                total += times * sent_rows(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
    return total


@pytest.mark.parametrize(("remat", "node"), [("none", 1), ("full", 1), ("full", 2)])
def test_experts_exchange_what_the_program_does(remat, node):
    """The dense transport's buffers, both ways, in the traced step, straight and by way of nodes."""
    config, split = run(remat, expert=4, expert_node=node), Split(1, 4, "replicated")
    mesh = stand_in_mesh(1, 4, "cpu")
    ids = jax.ShapeDtypeStruct((1, 8, config.train.seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids)
    batch["loss_mask"] = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)

    def step(state, batch):
        from dsv3_jax.parallel.mesh import use_mesh

        with use_mesh(mesh, config.mesh):
            return train_step(config, state, batch, 1, Schedules(0.0, 0.0, 0.3))[1].losses.loss

    jaxpr = jax.make_jaxpr(step)(abstract_state(config, mesh), batch).jaxpr
    moved = traffic.of_step(config, split, parse_topology("h100:1x8"))
    # A rank's own part of a buffer stays where it is: of four, or of two hops' two each.
    planned = sum(t.size for t in moved if "all-to-all" in t.what)
    assert planned == pytest.approx((3 / 4 if node == 1 else 1 / 2) * sent_rows(jaxpr))


def test_links_of_nodes():
    """8 GPUs a node: experts on NVLink, replicas on 16 nodes; experts on two nodes send between."""
    config, topology = run(expert=8), parse_topology("h100:16x8")
    found = traffic.of_step(config, Split(16, 8, "replicated"), topology)
    for t in found:
        assert (t.far == 0) == (t.axis == "expert")
    wide = traffic._over_links("all-to-all", "expert", 15.0, Split(8, 16, "replicated"), topology)
    assert (wide.near, wide.far) == pytest.approx((7.0, 8.0))  # 7 peers beside, 8 in the other node.


def test_a_slow_link_limits():
    """The same run on NVLink alone, and with its replicas on the network."""
    config = run("v3", data=16, sharding="fsdp", batch_size=16)
    split, params = Split(16, 1, "fsdp"), parameter_shapes(config)

    def bound(text):
        topology = parse_topology(text)
        return roofline.of_step(config, split, topology, params, traffic.of_step(config, split, topology))

    assert bound("h100:1x16").step < bound("h100:16x1").step
    assert bound("h100:16x1").limit == "network"
    assert 0 < bound("h100:1x16").mfu <= 1

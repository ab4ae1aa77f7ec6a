"""Ahead of time, by TPU's own compiler, where libtpu is installed."""

import dataclasses

import pytest
from planned import run

from dsv3_jax.config import AttentionConfig, MoEConfig, MTPConfig
from dsv3_jax.planning import PlanError, compiled, memory, parse_topology
from dsv3_jax.planning.shapes import split_of


def test_without_libtpu_the_error_says_how(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(PlanError, match="pip install libtpu"):
        compiled.devices(parse_topology("v5p:2x2x1"))


def test_collectives_of_a_text():
    text = """
      %a = bf16[8,4]{1,0} all-gather(%p), dimensions={0}
      %b = (f32[4]{0}, f32[8]{0}) all-reduce-start(%x, %y), channel_id=2
      %c = f32[4]{0} all-reduce-done(%b)
      %d = f32[4]{0} add(%all-gather.1, %c)
    """
    assert compiled.collectives(text) == {"all-gather": 1, "all-reduce": 1}


def test_a_step_on_two_hosts_of_chips():
    """A dense model over 8 chips: state exactly as planned; one step's peak near the plan's."""
    pytest.importorskip("libtpu", reason="needs libtpu")
    config = run(data=8, sharding="fsdp", precision="bf16", seq_len=128)
    model = dataclasses.replace(
        config.model,
        d_model=512,
        d_ff=1024,
        vocab_size=1024,
        n_layers=4,
        max_seq_len=128,
        attention=AttentionConfig(kind="mha", n_heads=4, head_dim=128),
        moe=MoEConfig(n_dense_layers=4),
        mtp=MTPConfig(depth=0),
    )
    config = dataclasses.replace(config, model=model)
    topology = parse_topology("v6e:2x4")
    found = compiled.compile_step(config, topology)
    plan = memory.of_step(config, split_of(config, topology), "tpu")
    # The batch and what is padded to whole tiles come on top of parameters and moments.
    assert found.state == pytest.approx(plan.parameters + plan.optimizer, rel=0.02)
    assert "all-gather" in compiled.collectives(found.text)
    too_large = parse_topology("v6e:2x3")
    with pytest.raises(PlanError, match="libtpu has no such slice"):
        compiled.devices(too_large)

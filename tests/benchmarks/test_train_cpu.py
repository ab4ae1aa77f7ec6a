"""The CPU benchmarks compare like with like: both models agree, and disagreement is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import cpu, scaling_cpu, train_cpu

# The tiny model, tinier: every parameter of the mapping is there (dense layer, experts, shared expert).
MODEL = dataclasses.replace(
    train_cpu.TINY,
    vocab_size=31,
    d_model=16,
    n_layers=2,
    d_ff=24,
    init_std=0.2,
    attention=dataclasses.replace(
        train_cpu.TINY.attention,
        n_heads=2,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    moe=dataclasses.replace(train_cpu.TINY.moe, n_experts=8, d_ff_expert=8),
)
CONFIG = train_cpu.run_config(MODEL, 2, 8)
BATCH = train_cpu.random_batch(MODEL.vocab_size, 2, 8)


@pytest.fixture(scope="module")
def compiled():
    """Our side, compiled once, and a copy of its first state."""
    ours = train_cpu.Ours(CONFIG, BATCH)
    return ours, jax.tree.map(np.array, ours.state)


def at_the_start(compiled):
    ours, start = compiled
    ours.state = jax.tree.map(jnp.array, start)  # The step overwrites the state that it is given.
    return ours, start.params


def test_both_models_train_alike(compiled):
    ours, params = at_the_start(compiled)
    found = train_cpu.check(ours, train_cpu.Peer(CONFIG, params, BATCH))
    first, second = (row for row in found["values"] if row["what"] == "loss" and row["step"] < 3)
    assert first["ours"] != second["ours"], "the optimizer moved nothing"


def test_a_peer_with_other_parameters_is_refused(compiled):
    ours, params = at_the_start(compiled)
    changed = jax.tree.map(np.copy, params)
    changed["moe_layers"]["moe"]["down"][0, 0] *= 2  # One expert of eight.
    with pytest.raises(RuntimeError, match="step 1: loss"):
        train_cpu.check(ours, train_cpu.Peer(CONFIG, changed, BATCH))


def test_rivals_take_turns_and_the_median_counts():
    calls = []
    times = cpu.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, calls=2)
    assert calls == list("ab" + "aabb" + "bbaa")
    assert times["a"].fastest <= times["a"].wall


def test_only_experts_that_are_not_active_are_added():
    configs = [scaling_cpu.with_experts(n, 32) for n in scaling_cpu.EXPERTS]
    kept = [dataclasses.replace(c.model.moe, n_experts=0) for c in configs]
    assert kept[0] == kept[1] == kept[2]
    assert all(c.train == configs[0].train for c in configs)

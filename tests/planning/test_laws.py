"""The scaling laws of DeepSeek LLM, at the figures that its paper and V3's report give."""

import pytest

from dsv3_jax.planning import PlanError, cost, laws


def test_1e23():
    """1.96e11 FLOPs a token and 5.09e11 tokens; at 1.25e14 FLOP/s 8e8 A100-seconds, 309 for 30 days."""
    found = laws.spend(1e23)
    assert found.flops_per_token == pytest.approx(1.96e11, rel=5e-3)  # Three digits are given.
    assert found.tokens == pytest.approx(5.09e11, rel=5e-3)
    assert found.flops_per_token * found.tokens == pytest.approx(1e23, rel=1e-3)  # C = M D.
    need = laws.machines(1e23, 1.25e14, 30)
    assert need.device_seconds == pytest.approx(8e8) and need.devices == 309


def test_learning_rate_and_batch_of_the_published_models():
    """Of 7B and 67B on 2T tokens: rates 4.2e-4 and 3.2e-4, batches of 2304 and 4608 sequences of 4096.

    The laws are a fit whose near-optimal band is wide: the paper's choices are within a fifth of it.
    """
    for n_layers, width, rate, sequences in ((30, 4096, 4.2e-4, 2304), (95, 8192, 3.2e-4, 4608)):
        compute = laws.dense_flops_per_token(n_layers, width, 4096) * 2e12
        found = laws.spend(compute)
        assert found.learning_rate == pytest.approx(rate, rel=0.2)
        assert found.batch == pytest.approx(sequences * 4096, rel=0.2)


def test_dense_shape_costs_what_is_asked():
    for wanted in (1e9, 1.96e11, 4e12):
        layers, width = laws.dense_shape(wanted)
        # A step of 128 in width changes the cost most where it is small.
        assert laws.dense_flops_per_token(layers, width, 4096) == pytest.approx(wanted, rel=0.25)


@pytest.mark.parametrize("compute", [0.0, -1e20, float("nan"), float("inf")])
def test_a_budget_is_positive(compute):
    with pytest.raises(PlanError, match="budget = .*above 0"):
        laws.spend(compute)


def test_devices_and_days_are_positive():
    with pytest.raises(PlanError, match="days = 0: must be above 0"):
        laws.machines(1e23, 1e14, 0)
    with pytest.raises(PlanError, match="flops-per-device = -1"):
        laws.machines(1e23, -1, 30)


def test_cost_is_arithmetic():
    """1e18 FLOPs on 4 devices of 1e15 FLOP/s at a half: 500 s, 2000 device-seconds."""
    found = cost.of_run(1e6, 1e12, 1e15, 4, 0.5, 3.6)
    assert found.seconds == pytest.approx(500) and found.device_hours == pytest.approx(2000 / 3600)
    assert found.dollars == pytest.approx(2.0) and found.days == pytest.approx(500 / 86400)
    assert cost.of_run(1, 1, 1, 1, 1.5, 0).seconds == pytest.approx(2 / 3)  # FP8, of the peak of bf16.
    with pytest.raises(PlanError, match="mfu = 2.2"):
        cost.of_run(1, 1, 1, 1, 2.2, 0)
    with pytest.raises(PlanError, match="price = -1"):
        cost.of_run(1, 1, 1, 1, 0.4, -1)

"""Schedules against the papers' published figures, optax, and a step-by-step simulation."""

import dataclasses
import math

import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import Config, ModelConfig, MoEConfig, MTPConfig, OptimizerConfig, TrainConfig
from dsv3_jax.training import schedules

T = 10**12  # A trillion tokens.
B = 10**9

V3 = Config(
    model=ModelConfig(moe=MoEConfig(bias_speed=0.001, bias_until=14.3 / 14.8), mtp=MTPConfig(depth=1)),
    optimizer=OptimizerConfig(peak_lr=2.2e-4, schedule="v3", warmup_steps=2000, final_ratio=0.1),
    train=TrainConfig(
        token_budget=14_800 * B,
        seq_len=4096,
        batch_size=15360,
        micro_batch_size=256,
        ramp_start_batch=3072,
        ramp_until=469 / 14800,
    ),
)
V2 = Config(
    optimizer=OptimizerConfig(peak_lr=2.4e-4, schedule="v2", warmup_steps=2000),
    train=TrainConfig(
        token_budget=8_100 * B,
        seq_len=4096,
        batch_size=9216,
        micro_batch_size=256,
        ramp_start_batch=2304,
        ramp_until=225 / 8100,
    ),
)
LLM = Config(
    optimizer=OptimizerConfig(
        peak_lr=4.2e-4,
        schedule="multi_step",
        warmup_steps=2000,
        milestones=(0.8, 0.9),
        multipliers=(0.316, 0.1),
    ),
    train=TrainConfig(token_budget=2_000 * B, batch_size=2304, seq_len=4096),
)


@pytest.mark.parametrize(
    ("config", "tokens", "rate"),
    [
        # DeepSeek-V3 §4.2: 2.2e-4 to 10T, cosine to 2.2e-5 over 4.3T, 2.2e-5 for 333B, 7.3e-6 for 167B.
        (V3, 100 * B, 2.2e-4),
        (V3, 10 * T - 1, 2.2e-4),
        (V3, 10 * T + 4_300 * B // 2, (2.2e-4 + 2.2e-5) / 2),
        (V3, 14_300 * B, 2.2e-5),
        (V3, 14_633 * B - 1, 2.2e-5),
        (V3, 14_633 * B, 7.3e-6),
        (V3, 14_800 * B, 7.3e-6),
        # DeepSeek-V2 §3.1.2: x0.316 at 60%, again at 90%.
        (V2, 4_860 * B - 1, 2.4e-4),
        (V2, 4_860 * B, 2.4e-4 * 0.316),
        (V2, 7_290 * B - 1, 2.4e-4 * 0.316),
        (V2, 7_290 * B, 2.4e-4 * 0.316 * 0.316),
        # DeepSeek LLM §2.3: 31.6% at 80%, 10% at 90%.
        (LLM, 1_600 * B - 1, 4.2e-4),
        (LLM, 1_600 * B, 4.2e-4 * 0.316),
        (LLM, 1_800 * B, 4.2e-5),
    ],
)
def test_learning_rate_is_the_published_one(config, tokens, rate):
    # Past the warm-up. 1e-12: float64 arithmetic, a handful of operations.
    assert schedules.learning_rate(config, 10_000, tokens) == pytest.approx(rate, rel=1e-12)


def test_milestones_are_exact_to_one_token():
    # float32 cannot tell 10e12 from 10e12 + 2**19; the schedule must.
    before = schedules.learning_rate(V3, 10_000, 14_633 * B - 1)
    after = schedules.learning_rate(V3, 10_000, 14_633 * B)
    assert before / after == pytest.approx(2.2e-5 / 7.3e-6, rel=1e-12)


@pytest.mark.parametrize("config", [V3, V2, LLM])
def test_warm_up_is_linear_in_steps_and_never_zero(config):
    peak = config.optimizer.peak_lr
    for step in (0, 1, 999, 1998):
        expected = peak * (step + 1) / 2000
        assert schedules.learning_rate(config, step, step * 4096) == pytest.approx(expected, rel=1e-12)
    assert schedules.learning_rate(config, 1999, 0) == pytest.approx(peak, rel=1e-12)


def test_cosine_equals_optax():
    steps, warmup, batch, seq_len = 300, 40, 8, 64
    config = Config(
        optimizer=OptimizerConfig(peak_lr=3e-3, schedule="cosine", warmup_steps=warmup, final_ratio=0.2),
        train=TrainConfig(steps=steps, batch_size=batch, seq_len=seq_len),
    )
    reference = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup, steps, end_value=6e-4)
    for step in (*range(0, steps, 7), steps - 1):
        ours = schedules.learning_rate(config, step, step * batch * seq_len)
        # Optax's warm-up starts at 0 on step 0; ours ends at the peak on step warmup - 1.
        theirs = reference(step + 1 if step < warmup else step)
        assert ours == pytest.approx(float(theirs), rel=2e-6)  # Optax computes in float32.


@pytest.mark.parametrize(
    ("config", "tokens", "size"),
    [(V3, 0, 3072), (V3, 469 * B, 15360), (V3, 14 * T, 15360), (V2, 0, 2304), (V2, 225 * B, 9216)],
)
def test_batch_ramp_ends_are_the_published_ones(config, tokens, size):
    assert schedules.batch_size_at(config, tokens) == size


@given(st.integers(0, 14_800 * B))
def test_batch_is_the_rounded_down_line(tokens):
    size = schedules.batch_size_at(V3, tokens)
    line = 3072 + 12288 * min(1.0, tokens / (469 * B))
    assert size % 256 == 0 and size <= 15360
    # 1e-6 of slack: the reference line is in float64, the ramp in integers.
    assert line - 256 - 1e-6 < size <= line + 1e-6


ramps = st.builds(
    lambda micro, start, growth, until, steps, seq: TrainConfig(
        steps=steps,
        seq_len=seq,
        micro_batch_size=micro,
        batch_size=micro * (start + growth),
        ramp_start_batch=micro * start,
        ramp_until=until,
    ),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 9),
    st.floats(0.0, 1.0),
    st.integers(0, 80),
    st.integers(1, 33),
)


def simulate(train: TrainConfig, budget: int) -> int:
    """Tokens of `train.steps` steps, one step at a time."""
    config = Config(train=dataclasses.replace(train, token_budget=budget))
    tokens = 0
    for _ in range(train.steps):
        tokens += schedules.batch_size_at(config, tokens) * train.seq_len
    return tokens


@given(ramps)
@settings(max_examples=60, deadline=None)
def test_default_budget_is_the_least_that_the_steps_do_not_exceed(train):
    budget = schedules.token_budget(Config(train=train))
    if budget == 0:
        assert train.steps == 0
        return
    assert simulate(train, budget) <= budget
    if budget > 1:
        assert simulate(train, budget - 1) > budget - 1


def test_default_budget_without_a_ramp_and_of_a_long_ramped_run():
    assert schedules.token_budget(Config(train=TrainConfig(steps=100, batch_size=8, seq_len=256))) == 204_800
    # A million ramped steps: the budget is found in well under a second, and steps use it up to a step.
    train = TrainConfig(
        steps=10**6,
        seq_len=4096,
        batch_size=15360,
        micro_batch_size=64,
        ramp_start_batch=3072,
        ramp_until=0.1,
    )
    budget = schedules.token_budget(Config(train=train))
    # The mean batch over a ramp linear in tokens is its logarithmic mean, by time = integral dt / size.
    mean = (15360 - 3072) / math.log(15360 / 3072)
    expected = 10**6 * 4096 / (0.1 / mean + 0.9 / 15360)
    assert budget == pytest.approx(expected, rel=1e-3)  # Rounding down to 64 sequences of at least 3072.


def test_bias_speed_and_mtp_weight_change_once():
    # V3 §4.2: gamma 0.001 until the last 500B tokens, then 0; lambda 0.3 for 10T tokens, then 0.1.
    assert schedules.bias_speed(V3, 14_300 * B - 1) == 0.001
    assert schedules.bias_speed(V3, 14_300 * B) == 0.0
    assert schedules.mtp_weight(V3, 10 * T - 1) == 0.3
    assert schedules.mtp_weight(V3, 10 * T) == 0.1


def test_bias_speed_shrinks_linearly_when_asked():
    moe = MoEConfig(bias_speed=0.01, bias_final_ratio=0.2, bias_until=0.5)
    config = Config(model=ModelConfig(moe=moe), train=TrainConfig(token_budget=1000))
    found = [schedules.bias_speed(config, tokens) for tokens in (0, 250, 499, 500)]
    assert found == pytest.approx([0.01, 0.006, 0.01 * (1 - 0.8 * 0.998), 0.0])


def test_the_last_step_of_a_default_run_still_moves_the_bias():
    train = TrainConfig(steps=3, batch_size=2, seq_len=8)
    assert schedules.bias_speed(Config(train=train), 2 * 2 * 8) == MoEConfig().bias_speed


def test_unknown_schedule_is_refused_by_name():
    config = Config(optimizer=OptimizerConfig(schedule="linear"))
    with pytest.raises(ValueError, match=r"optimizer\.schedule is 'linear'; use \"constant\""):
        schedules.learning_rate(config, 0, 0)

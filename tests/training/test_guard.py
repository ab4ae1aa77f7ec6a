"""The guard against plain restatements of its rules."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import TrainConfig
from dsv3_jax.training.guard import Guard, TrainingDiverged

NAN = float("nan")


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 6))
def test_counts_bad_steps_and_stops_at_k_in_a_row(finite, limit):
    guard = Guard(TrainConfig(max_bad_steps=limit))
    text = "".join("." if good else "x" for good in finite)
    stops_at = text.find("x" * limit)  # -1: never.
    seen = 0
    for step, good in enumerate(finite):
        seen += not good
        if stops_at >= 0 and step == stops_at + limit - 1:
            with pytest.raises(TrainingDiverged, match=rf"^{limit} steps .* step {step} \(data: docs 7-9\)"):
                guard.check(step, NAN, good, "docs 7-9")
            break
        message = guard.check(step, 2.0 if good else NAN, good, "docs 7-9")
        assert (message is None) == good
        if not good:
            assert f"step {step} " in message and "docs 7-9" in message
    assert guard.bad_steps == seen


def test_the_stop_names_the_step_whose_state_is_left():
    guard = Guard(TrainConfig(max_bad_steps=2))
    guard.check(6, 2.0, True, "a")
    guard.check(7, NAN, False, "b")
    with pytest.raises(TrainingDiverged, match=r"state is that of step 6.*train\.max_bad_steps \(now 2\)"):
        guard.check(8, NAN, False, "c")


def test_a_spike_is_reported_once_and_the_next_again():
    guard = Guard(TrainConfig(spike_factor=1.5))
    losses = [2.0] * 30 + [9.0, 9.0, 8.0] + [2.0] * 30 + [9.0]
    reported = [i for i, loss in enumerate(losses) if guard.check(i, loss, True, f"batch {i}")]
    assert reported == [30, 63]


def test_a_spike_names_step_loss_and_data():
    guard = Guard(TrainConfig(spike_factor=1.5))
    for step in range(30):
        guard.check(step, 2.0, True, "")
    message = guard.check(30, 9.0, True, "sequences 240-247")
    assert message == (
        "loss spike at step 30: 9.0000, over 1.5 times its running mean 2.0000; data: sequences 240-247"
    )


def test_a_loss_that_stays_high_becomes_the_level():
    guard = Guard(TrainConfig(spike_factor=1.5))
    losses = [2.0] * 30 + [4.0] * 200
    for step, loss in enumerate(losses):
        guard.check(step, loss, True, "")
    assert not guard.in_spike
    # The running mean: m += 0.05 (x - m), from 2 towards 4 over 200 steps.
    assert guard.mean == pytest.approx(4 - 2 * 0.95**200, rel=1e-9)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 120))
def test_falling_noisy_losses_of_a_healthy_run_are_no_spikes(seed, start):
    noise = np.random.default_rng(seed).normal(0, 0.05, 200)
    guard = Guard(TrainConfig(spike_factor=1.5))
    for i in range(200):
        loss = 2.0 + 4.0 * np.exp(-(start + i) / 40) + noise[i]
        assert guard.check(i, loss, True, "") is None


@given(st.lists(st.one_of(st.floats(0.5, 20.0), st.just(NAN)), max_size=60), st.integers(0, 60))
def test_resumed_from_its_saved_state_says_what_an_unbroken_one_says(losses, cut):
    config = TrainConfig(max_bad_steps=1000)

    def run(guard, start, stop):
        return [
            guard.check(i, loss, bool(np.isfinite(loss)), "d")
            for i, loss in list(enumerate(losses))[start:stop]
        ]

    unbroken = run(Guard(config), 0, None)
    first = Guard(config)
    before = run(first, 0, cut)
    second = Guard(config)
    second.restore(json.loads(json.dumps(first.state())))
    assert before + run(second, cut, None) == unbroken

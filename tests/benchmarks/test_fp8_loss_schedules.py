"""When a schedule is given up, which is tried next and which is taken, on losses and a clock made by hand."""

import math
from types import SimpleNamespace

import pytest

from benchmarks import fp8_loss_schedules as schedules

STEPS = 200


class Runs:
    """Two runs that cost a second a step; the second's loss is 1% higher from a step of each schedule on."""

    def __init__(self, parting):
        self.parting, self.clock, self.begun = parting, 0.0, []

    def begin(self, schedule):
        self.begun.append(schedule)
        done = 0

        def train(count):
            nonlocal done
            first, done = done, done + count
            self.clock += count
            factors = [1.01 if step >= self.parting[schedule] else 1.0 for step in range(first, done)]
            return {
                "bf16": [[2.0, 0.0, 1.0]] * count,
                "again": [[2.0 * factor, 0.0, 1.0] for factor in factors],
            }

        return train


def search(monkeypatch, runs, seconds):
    monkeypatch.setattr(schedules, "time", SimpleNamespace(monotonic=lambda: runs.clock))
    reports = []
    left = lambda: seconds - runs.clock  # noqa: E731
    found = schedules.search(list(runs.parting), runs.begin, STEPS, left, reports.append)
    assert reports[-1] == found
    return found


@pytest.mark.parametrize("factor", [1.01, 0.99, math.nan])
def test_first_window_beyond_the_limit(factor):
    # k steps of 50 at 1% are a gap of k/50 %: 0.24% with 12, 0.26% with 13. A NaN counts at once.
    bf16 = [[2.0, 0.0, 1.0]] * 100
    again = bf16[:60] + [[2.0 * factor, 0.0, 1.0]] * 40
    assert schedules.given_up({"bf16": bf16, "again": again[:72]}) == (61 if math.isnan(factor) else None)
    assert schedules.given_up({"bf16": bf16, "again": again}) == (61 if math.isnan(factor) else 73)


def test_first_schedule_that_holds(monkeypatch):
    runs = Runs({"high": 60, "middle": STEPS, "low": STEPS})
    high, middle = search(monkeypatch, runs, 1000.0)
    assert runs.begun == ["high", "middle"]  # Nothing is tried after the first that holds.
    assert (high["given_up"], high["steps"], high["held"]) == (73, 100, False)
    assert (middle["given_up"], middle["steps"], middle["held"]) == (None, STEPS, True)
    assert len(middle["runs"]["again"]) == STEPS and middle["largest_gap"] == 0.0
    assert schedules.chosen([high, middle]) is middle


def test_last_schedule_keeps_its_time(monkeypatch):
    # 330 s are left after "high", for a whole run and a quarter; 230 after "middle".
    runs = Runs({"high": 60, "middle": 60, "low": 60, "last": STEPS})
    found = search(monkeypatch, runs, 430.0)
    assert runs.begun == ["high", "middle", "last"] and found[-1]["held"]


def test_longest_when_time_is_over(monkeypatch):
    runs = Runs({"high": 120, "low": STEPS})
    high, low = search(monkeypatch, runs, 250.0)
    assert (low["steps"], low["given_up"], low["held"]) == (100, None, False)
    assert schedules.chosen([high, low]) is high  # Within the limit to step 132.

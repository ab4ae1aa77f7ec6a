"""Watches a run from the host: steps that were not finite, and spikes of the loss."""

import math
from dataclasses import dataclass

from dsv3_jax.config import TrainConfig

# Weight of a new loss in the running mean, and losses before the mean is trusted.
MEAN_WEIGHT = 0.05
MEAN_WARMUP = 20


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite."""


@dataclass
class Guard:
    """Counts bad steps, stops a run that has only those left, and reports spikes of the loss.

    A bad step, one with a loss or gradient that is not finite, has left the state unchanged; this is where
    it is counted. Fields other than `config` are what a checkpoint keeps: see `state` and `restore`.

    Attributes:
      config: `max_bad_steps` in a row stop the run; a loss above `spike_factor` times its running mean is
        a spike.
      bad_steps: bad steps so far.
      bad_in_a_row: bad steps since the last good one.
      mean: exponential running mean of the good losses; `seen` of them went into it.
      in_spike: whether the last loss belonged to a spike that has been reported.
    """

    config: TrainConfig
    bad_steps: int = 0
    bad_in_a_row: int = 0
    mean: float = 0.0
    seen: int = 0
    in_spike: bool = False

    def check(self, step: int, loss: float, finite: bool, data_range: str) -> str | None:
        """Looks at one step; call it for every step, in order.

        Args:
          step: the step's number.
          loss: its loss, nats a token.
          finite: whether its loss and gradients were.
          data_range: names the data that it read, for messages.

        Returns:
          A message to show, or None.

        Raises:
          TrainingDiverged: after `max_bad_steps` bad steps in a row.
        """
        if not finite:
            return self._bad(step, data_range)
        self.bad_in_a_row = 0
        limit = self.config.spike_factor * self.mean
        spike = self.seen >= MEAN_WARMUP and loss > limit
        message = None
        if spike and not self.in_spike:
            message = (
                f"loss spike at step {step}: {loss:.4f}, over {self.config.spike_factor:g} times "
                f"its running mean {self.mean:.4f}; data: {data_range}"
            )
        self.in_spike = spike
        if math.isfinite(loss):
            # A spike moves the mean too: a loss that stays high is a new level, not an endless spike.
            self.seen += 1
            self.mean += max(MEAN_WEIGHT, 1 / self.seen) * (loss - self.mean)
        return message

    def _bad(self, step: int, data_range: str) -> str:
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingDiverged(
                f"{self.bad_in_a_row} steps in a row with a loss or gradient that is not finite, the last of "
                f"them step {step} (data: {data_range}). The state is that of step "
                f"{step - self.bad_in_a_row}. Lower optimizer.peak_lr, or look at that data; "
                f"train.max_bad_steps (now {self.config.max_bad_steps}) sets how many are accepted."
            )
        return f"step {step} was not finite and changed nothing; data: {data_range}"

    def state(self) -> dict[str, int | float | bool]:
        """What to save with a checkpoint (JSON)."""
        names = ("bad_steps", "bad_in_a_row", "mean", "seen", "in_spike")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, int | float | bool]) -> None:
        """Continues from a saved `state`, so that a resumed run reports what an unbroken one would."""
        for name, value in state.items():
            setattr(self, name, value)

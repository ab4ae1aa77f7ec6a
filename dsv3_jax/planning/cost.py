"""What a run takes: days, device-hours and money."""

from typing import NamedTuple

from dsv3_jax.planning.hardware import PlanError

HOUR, DAY = 3600.0, 86400.0


class Cost(NamedTuple):
    """Of a run."""

    seconds: float
    device_hours: float
    dollars: float

    @property
    def days(self) -> float:
        """Of wall-clock time."""
        return self.seconds / DAY


def of_run(
    tokens: float, flops_per_token: float, peak: float, n_devices: int, mfu: float, price: float
) -> Cost:
    """The cost of training on `tokens` tokens.

    Args:
      tokens: of the run.
      flops_per_token: the model's.
      peak: bf16 FLOP/s of a device.
      n_devices: devices.
      mfu: the part of the peak that the model's FLOPs reach.
      price: dollars a device-hour.

    Raises:
      PlanError: `mfu` is not within (0, 2], or a price is negative.
    """
    if not 0 < mfu <= 2:  # FP8 counts against the peak of bf16.
        raise PlanError(f"mfu = {mfu:g}: above 0, at most 1 of the bf16 peak (2 in FP8); for example 0.4")
    if price < 0:
        raise PlanError(f"price = {price:g}: dollars a device-hour, at least 0")
    seconds = tokens * flops_per_token / (peak * n_devices * mfu)
    hours = seconds * n_devices / HOUR
    return Cost(seconds, hours, hours * price)

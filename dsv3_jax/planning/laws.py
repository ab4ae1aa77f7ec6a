"""How to spend a compute budget: the scaling laws of DeepSeek LLM (arXiv 2401.02954, section 3).

eta_opt = 0.3118 C^-0.1250      B_opt = 0.2920 C^0.3271     (eq 1; B in tokens)
M_opt   = 0.1715 C^0.5243       D_opt = 5.8316 C^0.4757     (eq 4; C = M D)
M       = 72 n_layer d^2 + 12 n_layer d l_seq               (eq 2; FLOPs a token without the embedding)
"""

import math
from typing import NamedTuple

from dsv3_jax.planning.hardware import PlanError

SECONDS_A_DAY = 86400.0


class Budget(NamedTuple):
    """What the laws say of a budget of `compute` FLOPs."""

    compute: float  # C, FLOPs.
    flops_per_token: float  # M.
    tokens: float  # D.
    learning_rate: float
    batch: float  # Tokens.


class Machines(NamedTuple):
    """What the budget takes on devices of one speed."""

    device_seconds: float
    devices: int  # For `days`.
    days: float


def spend(compute: float) -> Budget:
    """The model, the data, the learning rate and the batch of a budget.

    Raises:
      PlanError: the budget is not a positive number.
    """
    _positive("budget", compute, "FLOPs, for example 1e23")
    return Budget(
        compute,
        0.1715 * compute**0.5243,
        5.8316 * compute**0.4757,
        0.3118 * compute**-0.1250,
        0.2920 * compute**0.3271,
    )


def machines(compute: float, flops_per_device: float, days: float) -> Machines:
    """Devices that finish `compute` FLOPs within `days`, each at `flops_per_device` FLOP/s.

    Raises:
      PlanError: a value is not positive.
    """
    _positive("flops-per-device", flops_per_device, "FLOP/s that a device reaches, for example 1.25e14")
    _positive("days", days, "for example 30")
    seconds = compute / flops_per_device
    return Machines(seconds, math.ceil(seconds / (days * SECONDS_A_DAY)), days)


def dense_flops_per_token(n_layers: int, d_model: int, seq_len: int) -> float:
    """M of a dense model (eq 2)."""
    return 72 * n_layers * d_model**2 + 12 * n_layers * d_model * seq_len


def dense_shape(flops_per_token: float, seq_len: int = 4096) -> tuple[int, int]:
    """(layers, width) of a dense model near M, 128 times as wide as it is deep, a multiple of 128 wide."""

    def cost(width: int) -> float:
        return dense_flops_per_token(max(1, round(width / 128)), width, seq_len)

    width = 128
    while cost(width + 128) <= flops_per_token:
        width += 128
    if abs(cost(width + 128) - flops_per_token) < abs(cost(width) - flops_per_token):
        width += 128
    return max(1, round(width / 128)), width


def _positive(name: str, value: float, fix: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise PlanError(f"{name} = {value:g}: must be above 0: {fix}")

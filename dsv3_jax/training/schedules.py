"""What changes during a run: learning rate, batch size, router-bias speed, weight of the MTP loss.

Pure functions of Python integers. The host evaluates them once a step and hands the values to the jitted
step as float32 scalars, so that milestones stay exact in runs whose token counts (14.8e12) float32 cannot
hold. `step` counts optimizer steps already taken (0 for the first) and `tokens` counts the tokens that
they have read. Milestones are fractions of the token budget (`token_budget`).
"""

import functools
import math

from dsv3_jax.config import Config, OptimizerConfig, TrainConfig

# DeepSeek-V2 §3.1.2: x0.316 after 60% of the tokens, and again after 90%.
V2_MILESTONES = (0.6, 0.9)
V2_DROP = 0.316
# DeepSeek-V3 §4.2, in trillions of tokens: constant to 10, cosine over the next 4.3, constant over 0.333,
# and the last 0.167 at 7.3e-6, where the peak is 2.2e-4.
V3_MILESTONES = (10 / 14.8, 14.3 / 14.8, 14.633 / 14.8)
V3_LAST_RATIO = 7.3e-6 / 2.2e-4


def token_budget(config: Config) -> int:
    """The tokens that every milestone is a fraction of.

    `train.token_budget`, or, where that is 0, the tokens of `train.steps` steps. A batch-size ramp makes
    the second circular: the ramp ends at a fraction of the budget, and a longer ramp reads fewer tokens.
    The budget is then the smallest number of tokens that `steps` steps, ramped against it, do not exceed.
    """
    train = config.train
    if train.token_budget > 0:
        return train.token_budget
    return _tokens_of_all_steps(train)


def batch_size_at(config: Config, tokens: int) -> int:
    """Sequences in the step that starts after `tokens` tokens (DeepSeek-V3 §4.2: 3072 to 15360 over 469B).

    Linear in tokens from `ramp_start_batch` to `batch_size`, rounded down to whole micro-batches.
    """
    return _batch_size(config.train, tokens, token_budget(config))


def learning_rate(config: Config, step: int, tokens: int) -> float:
    """The learning rate of the step that follows `step` steps and `tokens` tokens.

    All schedules rise linearly over the first `warmup_steps` steps, reaching the peak on the last of
    them. Then, by `optimizer.schedule`:

    - "constant": the peak.
    - "cosine": from the peak at the end of the warm-up to `final_ratio` of it at the end of the budget.
    - "multi_step": `multipliers[i]` of the peak after `milestones[i]` (DeepSeek LLM §2.3: 0.316 after 0.8,
      0.1 after 0.9).
    - "v2": 0.316 times the rate before, at each milestone (DeepSeek-V2 §3.1.2).
    - "v3": constant to the first milestone, cosine to `final_ratio` at the second, constant to the third,
      then 7.3e-6/2.2e-4 of the peak (DeepSeek-V3 §4.2).
    """
    optimizer, budget = config.optimizer, token_budget(config)
    peak = optimizer.peak_lr
    warmup = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps > 0 else 1.0
    if optimizer.schedule == "constant":
        shape = 1.0
    elif optimizer.schedule == "cosine":
        start = _tokens_after(config.train, optimizer.warmup_steps, budget)
        shape = _cosine(tokens, start, budget, optimizer.final_ratio)
    elif optimizer.schedule == "multi_step":
        shape = _steps_down(tokens, budget, optimizer.milestones, optimizer.multipliers)
    elif optimizer.schedule == "v2":
        milestones = optimizer.milestones or V2_MILESTONES
        drops = tuple(V2_DROP ** (i + 1) for i in range(len(milestones)))
        shape = _steps_down(tokens, budget, milestones, drops)
    elif optimizer.schedule == "v3":
        shape = _v3(tokens, budget, optimizer)
    else:
        raise ValueError(
            f"optimizer.schedule is {optimizer.schedule!r}; "
            'use "constant", "cosine", "multi_step", "v2" or "v3"'
        )
    return peak * warmup * shape


def bias_speed(config: Config, tokens: int) -> float:
    """Step of the router bias (gamma): `bias_speed`, and 0 after `bias_until` of the budget (V3 §4.2).

    Ours: it may shrink linearly on the way. A short run needs a fast bias while a high learning rate
    moves the router, and a slow one at the end, where a fast one overshoots.
    """
    moe = config.model.moe
    end = _milestone(moe.bias_until, token_budget(config))
    if tokens >= end:
        return 0.0
    return moe.bias_speed * (1 - (1 - moe.bias_final_ratio) * tokens / end)


def mtp_weight(config: Config, tokens: int) -> float:
    """Weight of the MTP loss (lambda): 0.3 for the first 10T tokens and 0.1 after, in V3 (§4.2)."""
    mtp = config.model.mtp
    before = tokens < _milestone(mtp.loss_weight_until, token_budget(config))
    return mtp.loss_weight if before else mtp.final_loss_weight


def _milestone(fraction: float, budget: int) -> int:
    return round(fraction * budget)


def _steps_down(
    tokens: int, budget: int, milestones: tuple[float, ...], multipliers: tuple[float, ...]
) -> float:
    value = 1.0
    for milestone, multiplier in zip(milestones, multipliers, strict=True):
        if tokens >= _milestone(milestone, budget):
            value = multiplier
    return value


def _cosine(tokens: int, start: int, end: int, floor: float) -> float:
    """From 1 at `start` to `floor` at `end`; flat on both sides."""
    progress = min(1.0, max(0, tokens - start) / max(1, end - start))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _v3(tokens: int, budget: int, optimizer: OptimizerConfig) -> float:
    decay, hold, last = (_milestone(m, budget) for m in optimizer.milestones or V3_MILESTONES)
    return V3_LAST_RATIO if tokens >= last else _cosine(tokens, decay, hold, optimizer.final_ratio)


def _batch_size(train: TrainConfig, tokens: int, budget: int) -> int:
    ramp = _milestone(train.ramp_until, budget)
    if train.ramp_start_batch <= 0 or tokens >= ramp:
        return train.batch_size
    micro = train.micro_batch_size or train.batch_size
    size = train.ramp_start_batch + (train.batch_size - train.ramp_start_batch) * tokens // ramp
    return min(train.batch_size, max(micro, size // micro * micro))


@functools.lru_cache(maxsize=16)
def _tokens_after(train: TrainConfig, steps: int, budget: int) -> int:
    """Tokens read by the first `steps` steps. One turn of the loop a batch size, not a step."""
    tokens, left, ramp = 0, steps, _milestone(train.ramp_until, budget)
    while left > 0:
        size = _batch_size(train, tokens, budget)
        a_step = size * train.seq_len
        run = left if size >= train.batch_size else _steps_at_size(train, tokens, ramp, size, a_step)
        run = min(left, run)
        tokens, left = tokens + run * a_step, left - run
    return tokens


def _steps_at_size(train: TrainConfig, tokens: int, ramp: int, size: int, a_step: int) -> int:
    """Steps of `size` sequences from `tokens` on, until the ramp reaches the next whole micro-batch."""
    micro = train.micro_batch_size or train.batch_size
    growth = train.batch_size - train.ramp_start_batch
    wanted = min(size + micro, train.batch_size) - train.ramp_start_batch
    # The first token count whose size is the wanted one: growth * tokens // ramp >= wanted.
    until = -(-wanted * ramp // growth)
    return max(1, -(-(until - tokens) // a_step))


@functools.lru_cache(maxsize=16)
def _tokens_of_all_steps(train: TrainConfig) -> int:
    # Tokens read fall as the assumed budget grows, so one crossing exists and bisection finds it.
    low, high = 0, train.steps * train.batch_size * train.seq_len
    while low < high:
        middle = (low + high) // 2
        if _tokens_after(train, train.steps, middle) <= middle:
            high = middle
        else:
            low = middle + 1
    return low

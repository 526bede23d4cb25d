"""The learning rate as a pure function of the step. Nothing to save, nothing to resume."""

from __future__ import annotations

import math

from megadistill.config import TrainConfig


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Returns the learning rate of step `step` (from 0) of `steps`.

    Linear warm-up over warmup_steps, the first step already above 0; then by config.schedule:
    constant; cosine to lr * min_lr_ratio at the last step; or wsd, stable until the last
    decay_steps (default: a fifth of the steps), and then linear to the same end.
    """
    peak, warmup = config.lr, config.warmup_steps
    last = peak * config.min_lr_ratio
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    left = min(1.0, (steps - 1 - step) / _decay_steps(steps, config))
    return last + (peak - last) * left


def decay_begins(steps: int, config: TrainConfig) -> int:
    """Returns the number of steps before the decay of wsd, warm-up included."""
    return steps - _decay_steps(steps, config)


def _decay_steps(steps: int, config: TrainConfig) -> int:
    return config.decay_steps or max(1, steps // 5)

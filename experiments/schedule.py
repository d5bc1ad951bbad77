"""Learning rates as a function of the step alone, so that resuming needs no state."""

import math

SCHEDULES = ("cosine", "constant")


def rate(lr: float, step: int, num_steps: int, warmup: int = 0, schedule: str = "cosine") -> float:
    """The rate of a step: rises linearly to `lr` over `warmup` steps, then falls as a cosine to zero, or stays."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))

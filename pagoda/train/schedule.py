"""The learning rate's course over a run, as a share of its highest value: a pure function of the step.

    cosine      half a cosine from 1 down to min_lr_ratio
    linear      a straight line from 1 down to min_lr_ratio
    constant    1
    wsd         warm up, stay at 1, and fall in a straight line over the last decay_ratio of the steps (Hu et al. 2024)

All of them first rise in a straight line over warmup_steps.
"""

from __future__ import annotations

import math

from pagoda.common import one_of

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def multiplier(
    schedule: str,
    step: int,
    max_steps: int,
    warmup_steps: float = 0,
    min_lr_ratio: float = 0.1,
    decay_ratio: float = 0.2,
) -> float:
    """What the highest learning rate is multiplied by in a step, counted from 0.

    warmup_steps    below 1 it is a share of max_steps. Step i of w has (i + 1) / (w + 1), so that step w is the first
                    with 1 and none has 0 (as in nanoGPT)
    min_lr_ratio    is reached at step max_steps, the first that is not taken any more

    Raises PagodaError for an unknown schedule.
    """
    one_of("schedule", schedule, SCHEDULES)
    warmup = round(warmup_steps * max_steps) if warmup_steps < 1 else int(warmup_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    start = max(warmup, round(max_steps * (1 - decay_ratio))) if schedule == "wsd" else warmup
    done = min(max(step - start, 0) / max(max_steps - start, 1), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return min_lr_ratio + (1 - min_lr_ratio) * left

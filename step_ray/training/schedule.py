"""The learning rate of a step.

Takes the number of a step and the settings of a training, gives a learning rate. It keeps no state,
so a resumed training follows the same curve.
"""

import math

from step_ray.training.config import TrainConfig


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak; then a cosine to `final_lr_share` of it, or the peak.

    Args:
        step: steps finished before this one.
        num_steps: steps of the whole training.
        config: `learning_rate` (the peak), `schedule`, `final_lr_share`, `warmup_fraction`.
    """
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(num_steps - warmup - 1, 1)
    final = config.final_lr_share
    share = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share

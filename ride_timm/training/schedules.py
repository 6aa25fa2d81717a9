"""Learning-rate factors as functions of the epoch, counted from 0."""

import math

from ..errors import InputError

SCHEDULES = ("step", "cosine", "constant")


def lr_factor(
    epoch: int,
    epochs: int,
    schedule: str = "step",
    decay_epochs: tuple[int, ...] = (),
    decay_rate: float = 0.1,
    warmup_epochs: int = 0,
) -> float:
    """What the base learning rate is multiplied with in an epoch.

    Linear warm-up (1 + epoch) / warmup_epochs first. "step": decay_rate to the number of decay epochs reached, the
    authors' rule; "cosine": half a cosine from 1 towards 0 over all epochs (arXiv:1608.03983, equation 5, without
    restarts). InputError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}.")
    if epoch < warmup_epochs:
        return (1 + epoch) / warmup_epochs
    if schedule == "step":
        return decay_rate ** sum(epoch >= step for step in decay_epochs)
    return (1 + math.cos(math.pi * epoch / epochs)) / 2 if schedule == "cosine" else 1.0

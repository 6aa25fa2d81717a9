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
    """Factor on the base learning rate in an epoch.

    First a linear warm-up, (1 + epoch) / warmup_epochs. "step": decay_rate to the power of the decay epochs reached, as
    the authors do; "cosine": half a cosine from 1 towards 0 (arXiv:1608.03983, equation 5, without restarts). Raises
    `InputError` for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}.")
    if epoch < warmup_epochs:
        return (1 + epoch) / warmup_epochs
    if schedule == "step":
        return decay_rate ** sum(epoch >= step for step in decay_epochs)
    return (1 + math.cos(math.pi * epoch / epochs)) / 2 if schedule == "cosine" else 1.0

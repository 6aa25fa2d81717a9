"""Learning-rate factors as functions of time, in epochs from 0, and how long to fine-tune."""

import math

from ..errors import InputError

SCHEDULES = ("step", "cosine", "constant")


def lr_factor(
    time: float,
    epochs: int,
    schedule: str = "step",
    decay_epochs: tuple[int, ...] = (),
    decay_rate: float = 0.1,
    warmup_epochs: int = 0,
    tick: float = 1,
) -> float:
    """Factor on the base learning rate at a time, in epochs.

    tick: epochs between two changes: 1, or the length of a step. First a linear warm-up, (time + tick) / warmup_epochs.
    "step": decay_rate to the power of the decay epochs reached, as
    the authors do; "cosine": half a cosine from 1 towards 0 (arXiv:1608.03983, equation 5, without restarts). Raises
    `InputError` for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}.")
    if time < warmup_epochs:
        return min(1.0, (time + tick) / warmup_epochs)
    if schedule == "step":
        return decay_rate ** sum(time >= epoch for epoch in decay_epochs)
    return (1 + math.cos(math.pi * time / epochs)) / 2 if schedule == "cosine" else 1.0


def epochs_for(num_images: int) -> int:
    """Epochs of fine-tuning on so many images: 12 for 10,000, in proportion to 1 / sqrt(images), from 5 to 40.

    A compromise between equal steps, which overfits small sets, and equal epochs, which wastes time on large ones.
    """
    return round(min(40, max(5, 12 * math.sqrt(10_000 / num_images))))

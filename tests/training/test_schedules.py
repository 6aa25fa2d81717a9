"""Learning-rate factors against the authors' values and closed forms."""

import json
import math
from pathlib import Path

import pytest

from ride_timm import InputError
from ride_timm.training.schedules import epochs_for, lr_factor

GOLDEN = json.loads((Path(__file__).parents[1] / "parity" / "lr.json").read_text())
CIFAR = dict(schedule="step", decay_epochs=(160, 180), decay_rate=0.01)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cifar", dict(CIFAR, warmup_epochs=5)),
        ("cifar_distill", dict(CIFAR, warmup_epochs=20)),
        ("imagenet", dict(schedule="step", decay_epochs=(60, 80), decay_rate=0.1, warmup_epochs=5)),
    ],
)
def test_step_schedule_equals_the_authors(name, settings):
    factors = [lr_factor(epoch, len(GOLDEN[name]), **settings) for epoch in range(len(GOLDEN[name]))]
    assert factors == pytest.approx(GOLDEN[name], rel=1e-12)


def test_cosine_falls_from_one_towards_zero():
    factors = [lr_factor(epoch, 5, "cosine") for epoch in range(5)]
    assert factors == pytest.approx([(1 + math.cos(math.pi * e / 5)) / 2 for e in range(5)])
    assert factors[0] == 1 and factors == sorted(factors, reverse=True) and factors[-1] > 0


def test_constant_after_warm_up():
    assert [lr_factor(e, 4, "constant", warmup_epochs=2) for e in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_unknown_schedule():
    with pytest.raises(InputError, match=r"schedule='stairs': expected one of step, cosine"):
        lr_factor(0, 1, "stairs")


def test_by_step_a_linear_warm_up_then_half_a_cosine():
    """Warm-up in 8 steps to 1, then the cosine of the whole time; no jump larger than a step's."""
    steps, epochs = 8, 3
    factors = [lr_factor(i / steps, epochs, "cosine", warmup_epochs=1, tick=1 / steps) for i in range(steps * epochs)]
    assert factors[:steps] == pytest.approx([(i + 1) / steps for i in range(steps)])
    assert factors[steps:] == pytest.approx([(1 + math.cos(math.pi * i / 24)) / 2 for i in range(8, 24)])


def test_epochs_fall_with_the_square_root_of_the_images_within_bounds():
    assert [epochs_for(n) for n in (1, 2500, 10_000, 40_000, 10**7)] == [40, 24, 12, 6, 5]

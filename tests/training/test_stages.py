"""Random streams, gradient accumulation, and the steps and scale of fp16 of a stage."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ride_timm.training.recipe import Recipe
from ride_timm.training.stages import Stage, seed_epoch
from ride_timm.training.state import TrainingState


def _draws(*key):
    seed_epoch(*key)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_every_rank_and_epoch_has_its_own_stream():
    found = [_draws(3, epoch, rank) for epoch in range(6) for rank in range(6)]
    for generator in zip(*found, strict=True):
        assert len(set(generator)) == len(found)
    assert _draws(3, 2, 1) == _draws(3, 2, 1) != _draws(4, 2, 1)


@pytest.mark.parametrize("seed", [0, 2273207701, 2**53])
def test_every_seed_works_on_every_rank(seed):
    assert _draws(seed, 0, 0) != _draws(seed, 0, 1)


@pytest.mark.parametrize(
    ("num_batches", "accumulation", "expected"),
    [
        (3, 1, [(1, True)] * 3),
        (5, 2, [(2, False), (2, True)] * 2 + [(1, True)]),
        (2, 3, [(2, False), (2, True)]),
    ],
)
def test_accumulation_averages_over_the_batches_of_a_step(num_batches, accumulation, expected):
    class Bare(Stage):
        def __init__(self):
            self.loader = [(i, i) for i in range(num_batches)]
            self.recipe = type("Keys", (), dict(gradient_accumulation=accumulation))

    assert [(size, last) for _, _, size, last in Bare().micro_batches()] == expected


@pytest.mark.parametrize(("lr_per", "first", "later"), [("epoch", 0.5, 1.0), ("step", 0.125, 0.875)])
def test_the_rate_of_an_epoch_is_that_of_its_first_step(lr_per, first, later):
    stage = object.__new__(Stage)
    how = dict(epochs=8, lr=1.0, lr_per=lr_per, schedule="constant", warmup_epochs=2)
    stage.settings, stage.updates_per_epoch = Recipe(**how).stage("experts"), 4
    assert stage.lr_at(0) == first and stage.lr_at(1.5) == later


class Part(dict):
    """A part of a stage whose state is a dictionary."""

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, state):
        self.clear()
        self.update(state)

    def frozen_names(self):
        return set()


class HalfPrecision(Stage):
    """A stage in fp16."""

    def __init__(self, name="experts", scale=65536.0):
        self.name, self.model, self.optimizer = name, Part(), Part()
        self.accelerator = SimpleNamespace(scaler=Part(scale=scale))
        self.selection, self.ema = SimpleNamespace(best=None), SimpleNamespace(module=Part())


def test_stages_share_one_loss_scale():
    state = TrainingState()
    state.capture(HalfPrecision(scale=512.0), 4)
    state.advance("router", {})
    router = HalfPrecision("router")
    assert state.restore(router) == 0 and router.accelerator.scaler == {"scale": 512.0}

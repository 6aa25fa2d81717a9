"""Random streams and gradient accumulation of a stage."""

import random

import numpy as np
import pytest
import torch

from ride_timm.training.stages import Stage, seed_epoch


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

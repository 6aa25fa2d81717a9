"""Mixup and CutMix: images and targets are mixed by the same fraction. Random erasing."""

import random

import numpy as np
import pytest
import torch

from ride_timm import InputError
from ride_timm.data.augment.mixing import Erasing, Mixing


def batch(size):
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(size, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 4, (size,), generator=generator)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_images_hold_both_images_by_the_fraction_of_their_targets(alphas, size):
    np.random.seed(3)
    mixing, paired = Mixing(*alphas), size - size % 2
    for _ in range(6):
        images, targets = batch(size)
        partners = torch.cat([torch.arange(paired).flip(0), torch.arange(paired, size)])
        original = images.clone()
        mixed, (first, others, fraction) = mixing(images, targets)
        assert torch.equal(first, targets) and torch.equal(others, targets[partners]) and 0 <= fraction <= 1
        blend = fraction * original + (1 - fraction) * original[partners]
        own, other = (torch.isclose(mixed, x).all(1) for x in (original, original[partners]))
        if not torch.allclose(mixed, blend, atol=1e-6):  # then it was CutMix: a box of the other image
            assert alphas[1] > 0 and (own | other).all()
            area = (~own).float().mean((1, 2))[:paired]
            torch.testing.assert_close(area, (1 - fraction).float().expand(paired), atol=1e-6, rtol=0)
        assert torch.equal(mixed[paired:], original[paired:])


def test_the_fraction_follows_from_numpys_seed():
    fractions = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        fractions.append(Mixing(0.4)(*batch(4))[1].fraction)
    assert fractions[0] == fractions[1] != fractions[2]


@pytest.mark.parametrize("alphas", [(0.0, 0.0), (-0.4, 1.0), (float("nan"), 0.0)])
def test_an_alpha_out_of_range_is_named(alphas):
    with pytest.raises(InputError, match="mixing needs an alpha above 0, got mixup"):
        Mixing(*alphas)


@pytest.mark.parametrize(("probability", "views", "num_whole"), [(1.0, 1, 0), (1.0, 2, 300), (0.5, 1, 300)])
def test_erasing_covers_one_rectangle_of_each_chosen_image(probability, views, num_whole):
    random.seed(5)
    images = torch.rand(600, 3, 16, 16).add(1).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(600)
    erased, same = Erasing(probability, views)(images.clone(), targets)
    assert same is targets
    covered = (erased == 0).all(1)
    assert torch.equal(torch.where(covered[:, None], images, erased), images)  # elsewhere nothing changes
    untouched = ~covered.flatten(1).any(1)
    assert untouched.sum() == pytest.approx(num_whole, abs=0 if probability == 1 else 60)
    assert untouched[: len(images) // views if views > 1 else 0].all()  # the first view is never erased
    for mask in covered[~untouched]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns and 0.01 < mask.float().mean() < 0.4


@pytest.mark.parametrize("probability", [0, -0.1, 1.5, float("nan")])
def test_bad_erasing(probability):
    with pytest.raises(InputError, match=r"random_erasing=.*: expected a probability above 0, at most 1"):
        Erasing(probability)

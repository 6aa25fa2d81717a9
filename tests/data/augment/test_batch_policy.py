"""AutoAugment's policy for CIFAR-10 on batches: torchvision's pixels and frequencies, image by image."""

from collections import Counter

import pytest
import torch
from torchvision import transforms as T
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as F

from ride_timm.data.augment.batch_policy import _NAMES, _NONE, _SIGNED, BatchPolicy
from ride_timm.data.augment.policies import POLICIES

MEAN = POLICIES["cifar"].mean
THEIRS = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)


@pytest.fixture(scope="module")
def images():
    """Uint8 [9, 32, 32, 3], of several contrasts, one of them uniform."""
    pixels = torch.rand(9, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(0, 1, 9)[:, None, None, None]
    return (255 * (pixels * scales + (1 - scales) * 0.3)).to(torch.uint8)


@pytest.mark.parametrize("level", [0, 4, 9])
@pytest.mark.parametrize("name", _NAMES)
def test_each_operation_is_that_of_torchvision(name, level, images):
    policy = BatchPolicy(MEAN)
    magnitudes, signed = THEIRS._augmentation_space(10, (32, 32))[name]
    assert signed == (name in _SIGNED)
    for sign in (1, -1) if signed else (1,):
        change = torch.tensor([_NAMES.index(name), sign * level / 9]).expand(len(images), 1, 2).double()
        found = policy(images, change)
        magnitude = sign * float(magnitudes[level]) if magnitudes.ndim else 0.0
        for image, own in zip(images.permute(0, 3, 1, 2), found.permute(0, 3, 1, 2), strict=True):
            expected = _apply_op(image, name, magnitude, T.InterpolationMode.NEAREST, policy.fill)
            difference = (own.int() - expected.int()).abs()
            # half a level may be rounded either way, and the nearest of two pixels be either
            assert difference.max() <= 1 or (difference.amax(0) > 0).float().mean() < 0.02


@pytest.mark.parametrize(
    ("name", "function", "amount"),
    [
        ("Brightness", F.adjust_brightness, lambda strength: 1 + 0.9 * strength),
        ("Color", F.adjust_saturation, lambda strength: 1 + 0.9 * strength),
        ("Contrast", F.adjust_contrast, lambda strength: 1 + 0.9 * strength),
        ("Sharpness", F.adjust_sharpness, lambda strength: 1 + 0.9 * strength),
        ("Posterize", F.posterize, lambda strength: 8 - round(4 * strength)),
        ("Solarize", F.solarize, lambda strength: 255 * (1 - strength)),
    ],
)
def test_colours_of_any_strength_are_those_of_torchvision_to_the_bit(name, function, amount):
    """Images of one batch, each with its strength: noise, and few colours, where rounding decides."""
    generator = torch.Generator().manual_seed(0)
    strengths = torch.arange(-9 if name in _SIGNED else 0, 10).double() / 9
    images = torch.randint(256, (len(strengths), 3, 32, 32), generator=generator, dtype=torch.uint8)
    images[::2] = images[::2] // 26 * 10
    changes = torch.stack([torch.full_like(strengths, _NAMES.index(name)), strengths], -1)
    found = BatchPolicy(MEAN)(images.permute(0, 2, 3, 1).contiguous(), changes[:, None])
    for image, own, strength in zip(images, found.permute(0, 3, 1, 2), strengths.tolist(), strict=True):
        assert torch.equal(own, function(image, amount(strength))), strength


def test_sub_policies_are_drawn_as_often_as_they_should():
    policy, num_images = BatchPolicy(MEAN), 200_000
    changes = policy.draw(num_images, torch.Generator().manual_seed(0))
    drawn = Counter(
        (slot, int(kind), round(9 * abs(s))) for row in changes.tolist() for slot, (kind, s) in enumerate(row)
    )
    expected: Counter = Counter()
    for sub_policy in THEIRS.policies:
        for slot, (name, chance, level) in enumerate(sub_policy):
            expected[slot, _NAMES.index(name), level or 0] += chance * num_images / len(THEIRS.policies)
    applied = {key: count for key, count in drawn.items() if key[1] != _NONE}
    assert applied.keys() == {key for key, count in expected.items() if count}
    for key, count in applied.items():
        assert count == pytest.approx(expected[key], rel=0.08)
    kinds, strengths = changes.unbind(-1)
    for signed in (True, False):
        chosen = (kinds != _NONE) & ((kinds < len(_SIGNED)) == signed) & (strengths != 0)
        assert (strengths[chosen] < 0).double().mean() == pytest.approx(0.5 if signed else 0, abs=0.01)


def test_a_batch_is_changed_as_its_images_are(images):
    policy = BatchPolicy(MEAN)
    changes = policy.draw(len(images), torch.Generator().manual_seed(3))
    changes[0] = _NONE
    before = images.clone()
    found = policy(images, changes)
    assert torch.equal(images, before) and torch.equal(found[0], images[0])
    alone = torch.cat([policy(images[i : i + 1], changes[i : i + 1]) for i in range(len(images))])
    assert torch.equal(found, alone) and not torch.equal(found, images)

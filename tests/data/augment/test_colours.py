"""Colour changes of a batch: those of torchvision and Pillow, in any order."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from encoded_images import encoded, image_set, png_set, smooth
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F

from ride_timm.data.augment.colours import BatchColours, draw_jitter, jittered, no_jitter
from ride_timm.data.augment.images import TensorCrop, build_transform
from ride_timm.data.augment.policies import POLICIES, Policy
from ride_timm.data.loaders.orders import SAMPLE, RankSlices, SequentialOrder
from ride_timm.data.loaders.workers import ViewTransform, WorkerBatches, seeded

IMAGENET = POLICIES["imagenet"]


def photographs(count: int, size: int = 40) -> torch.Tensor:
    """Uint8 [count, 3, size, size], from dark to bright."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 120, (count, 3, size, size), generator=generator)
    return (noise + torch.linspace(0, 135, count)[:, None, None, None]).to(torch.uint8)


STEPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)


def one_by_one(image: Any, changes: torch.Tensor) -> Any:
    """The changes of one image [K, 2], as torchvision applies them."""
    for kind, factor in changes.tolist():
        image = STEPS[int(kind)](image, factor)
    return image


def random_changes(order: tuple[int, ...], count: int) -> torch.Tensor:
    factors = torch.rand(count, 3, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.6
    return torch.stack([torch.tensor([(kind, float(row[kind])) for kind in order]) for row in factors])


@pytest.mark.parametrize("order", permutations(range(3)))
def test_changes_are_those_of_torchvision_where_none_is_clipped(order):
    images, changes = photographs(6).double() / 255 * 0.3 + 0.25, random_changes(order, 6)  # 0.25 to 0.55
    found = jittered(images.float() * 255, changes) / 255
    for image, drawn, own in zip(images, changes, found, strict=True):
        # torchvision's grey has weights of four digits, 0.2989 where Pillow's are 0.299
        torch.testing.assert_close(own.double(), one_by_one(image, drawn), atol=5e-5, rtol=0)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_changes_are_those_of_pillow_but_for_its_rounding(order):
    images, changes = (photographs(6).float() * 0.3 + 64).to(torch.uint8), random_changes(order, 6)
    found = jittered(images.float(), changes).permute(0, 2, 3, 1).numpy()
    for image, drawn, own in zip(images, changes, found, strict=True):
        expected = np.asarray(one_by_one(Image.fromarray(image.permute(1, 2, 0).numpy()), drawn))
        assert abs(own - expected).max() < 3.5  # it rounds down three times


def test_values_are_clipped_once_at_the_end():
    images = torch.full((1, 3, 2, 2), 200.0)
    changes = torch.tensor([[(0, 2.0), (0, 0.5)]])
    assert torch.equal(jittered(images.clone(), changes), images)  # 400 in between
    assert torch.equal(jittered(images.clone(), changes[:, :1]), torch.full_like(images, 255.0))


def test_draws_are_those_of_torchvision_and_none_changes_nothing():
    jitter, images = T.ColorJitter(0.4, 0.4, 0.4), photographs(1).double() / 255 * 0.3 + 0.25
    for seed in range(20):
        torch.manual_seed(seed)
        expected, after = jitter(images[0]), torch.rand(1)
        torch.manual_seed(seed)
        found = jittered(images.float() * 255, draw_jitter(jitter)[None])[0].double() / 255
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
        assert torch.equal(torch.rand(1), after)
    pixels = photographs(2).float()
    assert torch.equal(jittered(pixels.clone(), torch.stack([no_jitter()] * 2)), pixels)


def test_a_batch_is_normalised_as_by_torchvision_bit_for_bit():
    images = photographs(3)
    found = BatchColours(IMAGENET)(images, torch.empty(3, 0, 2))
    assert found.is_contiguous(memory_format=torch.channels_last)
    steps = T.Compose([T.ToTensor(), T.Normalize(IMAGENET.mean, IMAGENET.std)])
    assert torch.equal(found, torch.stack([steps(image.permute(1, 2, 0).numpy()) for image in images]))
    assert BatchColours(IMAGENET)(images[:0], torch.empty(0, 3, 2)).shape == (0, 3, 40, 40)


def largest_and_median_difference(
    found: torch.Tensor, expected: torch.Tensor, policy: Policy = IMAGENET
) -> tuple[float, float]:
    """Of normalised images, in 8-bit levels."""
    difference = ((found - expected) * torch.tensor(policy.std)[:, None, None] * 255).abs()
    return float(difference.max()), float(difference.median())


@pytest.mark.parametrize("cutout", [0, 8])
def test_views_of_a_batch_are_jittered_as_single_images_are(cutout: int):
    data, policy = png_set(5, size=(40, 36)), replace(IMAGENET, cutout=cutout)  # a JPEG would be resized by torch
    transform = ViewTransform(policy, True, 24, views=2)
    loader = WorkerBatches(data, transform, order=SequentialOrder(5), slices=RankSlices(5, 5, True, 0, 1), seed=0)
    ((images, _),) = loader
    for view, kind in zip(images.unflatten(0, (2, 5)), (policy.weak, policy), strict=True):
        single = build_transform(kind, True, 24)
        for position, image in enumerate(view):
            with seeded(0, SAMPLE, 0, position):
                largest, median = largest_and_median_difference(image, data.read(position, single)[0])
            # Cutout's square must stay black, so with it Pillow jitters; without, it rounds and clips at each change
            assert largest < 1e-3 if kind.cutout else median < 2.5


def test_jpegs_cropped_by_torch_differ_by_rounding():
    data, policy = image_set(*(encoded(smooth(90 + 20 * i, 80)) for i in range(4))), POLICIES["inat"]
    transform = ViewTransform(policy, True, 32)
    assert isinstance(transform.crop, TensorCrop)
    loader = WorkerBatches(data, transform, order=SequentialOrder(4), slices=RankSlices(4, 4, True, 0, 1), seed=0)
    ((images, _),) = loader
    single, expected = build_transform(policy, True, 32), []
    for position in range(4):
        with seeded(0, SAMPLE, 0, position):
            expected.append(data.read(position, single)[0])
    assert 0 < largest_and_median_difference(images, torch.stack(expected), policy)[0] < 1.01

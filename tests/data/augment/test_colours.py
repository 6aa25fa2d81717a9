"""Colour changes of a batch: Pillow's pixels, whatever the order, and the same batches wherever they are made."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from encoded_images import encoded, image_set, png_set, smooth
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as F

from ride_timm.data.augment.colours import BatchColours, draw_jitter, jittered, no_jitter
from ride_timm.data.augment.images import TensorCrop
from ride_timm.data.augment.policies import POLICIES, Policy
from ride_timm.data.loaders.orders import RankSlices, SequentialOrder
from ride_timm.data.loaders.workers import ViewTransform, WorkerBatches

IMAGENET = POLICIES["imagenet"]


def photographs(count: int, size: int = 40) -> torch.Tensor:
    """Uint8 [count, 3, size, size], from dark to bright."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 120, (count, 3, size, size), generator=generator)
    return (noise + torch.linspace(0, 135, count)[:, None, None, None]).to(torch.uint8)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_changes_are_those_of_pillow_in_every_order(order):
    images, factors = photographs(6), torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.6
    changes = torch.stack([torch.tensor([(kind, float(row[kind])) for kind in order]) for row in factors])
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    expected = []
    for image, row in zip(images, factors.tolist(), strict=True):
        changed = Image.fromarray(image.permute(1, 2, 0).numpy())
        for kind in order:
            changed = steps[kind](changed, row[kind])
        expected.append(np.asarray(changed))
    found = jittered(images.float(), changes).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack(expected))


def test_draws_are_those_of_torchvision_and_none_changes_nothing():
    jitter, images = T.ColorJitter(0.4, 0.4, 0.4), photographs(1)
    for seed in range(20):
        torch.manual_seed(seed)
        expected, after = np.asarray(jitter(Image.fromarray(images[0].permute(1, 2, 0).numpy()))), torch.rand(1)
        torch.manual_seed(seed)
        found = jittered(images.float(), draw_jitter(jitter)[None])[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected) and torch.equal(torch.rand(1), after)
    assert torch.equal(jittered(images.float(), no_jitter()[None]), images.float())


def test_a_batch_is_normalised_as_by_torchvision_bit_for_bit():
    images = photographs(3)
    found = BatchColours(IMAGENET)(images, torch.empty(3, 0, 2))
    assert found.is_contiguous(memory_format=torch.channels_last)
    steps = T.Compose([T.ToTensor(), T.Normalize(IMAGENET.mean, IMAGENET.std)])
    assert torch.equal(found, torch.stack([steps(image.permute(1, 2, 0).numpy()) for image in images]))
    assert BatchColours(IMAGENET)(images[:0], torch.empty(0, 3, 2)).shape == (0, 3, 40, 40)


@pytest.mark.parametrize("policy", [IMAGENET, IMAGENET.strong("rand-m9-mstd0.5"), replace(IMAGENET, cutout=8)])
@pytest.mark.parametrize("views", [1, 2])
def test_jitter_of_the_batch_is_that_of_its_images(policy: Policy, views: int):
    data = png_set(5, size=(40, 36))  # a JPEG would be resized by torch, to rounding
    batches = []
    for defer in (False, True):
        transform = ViewTransform(policy, True, 24, views=views, defer_jitter=defer)
        loader = WorkerBatches(
            data, transform, order=SequentialOrder(5), slices=RankSlices(5, 3, True, 0, 1), seed=0, num_workers=0
        )
        batches.append(list(loader))
    for (images, labels), (same, same_labels) in zip(*batches, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, same_labels)
        assert len(images) == views * len(labels)


def test_jpegs_of_a_gpus_batch_differ_by_rounding():
    data = image_set(*(encoded(smooth(90 + 20 * i, 80)) for i in range(4)))
    batches = []
    for defer in (False, True):
        transform = ViewTransform(POLICIES["inat"], True, 32, defer_jitter=defer)
        assert isinstance(transform.crop, TensorCrop) == defer
        loader = WorkerBatches(data, transform, order=SequentialOrder(4), slices=RankSlices(4, 4, True, 0, 1), seed=0)
        ((images, _),) = loader
        batches.append(images * torch.tensor(POLICIES["inat"].std)[:, None, None] * 255)
    assert 0 < (batches[0] - batches[1]).abs().max() < 1.01

"""AutoAugment and its kind: their generator, their position in the transform, their names."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from ride_timm import InputError
from ride_timm.data.augment.auto_augment import AutoAugment, _operations
from ride_timm.data.augment.batches import Draws
from ride_timm.data.augment.images import build_augment
from ride_timm.data.augment.policies import get_policy
from ride_timm.data.load import load_longtail
from ride_timm.data.loaders import make_loader
from ride_timm.data.loaders.in_memory import STRONG, decode

DESCRIPTIONS = [
    "rand-m9-mstd0.5",
    "rand-m9-n3-mstd0.5-inc1",
    "original",
    "v0",
    "augmix-m3-w3",
    "3a",
    "cifar10",
    "trivial",
]
MEAN = (0.5, 0.4, 0.3)


def picture(size=32):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_choices_follow_from_torchs_generator_alone(description):
    augment = AutoAugment(description, 32, MEAN)

    def draw(seed):
        torch.manual_seed(seed)
        random.seed(int.from_bytes(np.random.bytes(4), "big"))  # in any state
        return [np.asarray(augment(picture())) for _ in range(6)]

    one, again, other = draw(0), draw(0), draw(1)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert any(not np.array_equal(a, np.asarray(picture())) for a in one)
    assert all(a.shape == (32, 32, 3) and a.dtype == np.uint8 for a in one)


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_a_spawned_worker_gets_the_same_policy(description):
    """macOS and Windows pickle a transform to hand it to a worker."""
    augment = AutoAugment(description, 32, MEAN)
    copied, seeds = pickle.loads(pickle.dumps(augment)), torch.arange(6)
    pairs = zip(augment.each([picture()] * 6, seeds), copied.each([picture()] * 6, seeds), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_other_generators_are_left_where_they_were():
    random.seed(5)
    np.random.seed(5)
    expected = (random.random(), np.random.rand())
    random.seed(5)
    np.random.seed(5)
    AutoAugment("rand-m9-mstd0.5", 32, MEAN)(picture())
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize(("name", "after"), [("cifar", None), ("imagenet", "RandomHorizontalFlip")])
def test_it_precedes_a_padded_crop_or_follows_the_flip_in_training_only(name, after):
    plain = get_policy(name)
    policy = plain.strong("rand-m9-mstd0.5")
    assert policy.in_memory == plain.in_memory and get_policy(name) == plain and plain.auto_augment is None
    size = policy.size
    steps = [type(step).__name__ for step in build_augment(policy, True).transforms]
    without = [type(step).__name__ for step in build_augment(plain, True).transforms]
    without = [step for step in without if step not in ("ColorJitter", "RandomRotation")]  # it takes their place
    position = steps.index("AutoAugment")
    assert [None, *steps][position] == after and steps[:position] + steps[position + 1 :] == without
    image = picture(size)
    assert build_augment(policy, True)(image).shape == (3, size, size)
    assert torch.equal(build_augment(policy, False)(image), build_augment(plain, False)(image))


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_a_batch_is_its_images_one_by_one(description):
    augment, seeds = AutoAugment(description, 32, MEAN), torch.tensor([3, 2**32 - 1, 3, 0])
    images = torch.from_numpy(np.stack([np.asarray(picture())] * 4))
    together = augment.batch(images, seeds)
    assert together.dtype == torch.uint8 and np.array_equal(images[0], picture())
    for one, seed in zip(together, seeds, strict=True):
        (alone,) = augment.each([picture()], seed[None])
        assert np.array_equal(one, alone)
    assert torch.equal(together[0], together[2])


def test_a_batch_of_small_images_is_changed_before_its_crop(colours, monkeypatch):
    images = load_longtail(str(colours), imb_type="none").train
    policy = get_policy("cifar").strong("rand-m9-mstd0.5")
    loader = make_loader(images, policy, train=True, batch_size=12, seed=3)
    auto_augment = loader.loader.dataset.auto_augment
    seen, change = [], auto_augment.batch

    def batch(pixels, seeds):
        seen.append((pixels, seeds, change(pixels, seeds)))
        return seen[-1][-1]

    still = Draws(*(torch.full((12,), value) for value in (policy.padding, policy.padding, False, 0.0)))
    monkeypatch.setattr(auto_augment, "batch", batch)
    monkeypatch.setattr(loader.augments[STRONG], "draw", lambda number, generator: still.part(0, number))
    for (made, _), low in zip(loader, range(0, len(images), 12), strict=True):
        pixels, seeds, changed = seen[-1]
        order = torch.from_numpy(loader.order(0))[low : low + 12]
        assert torch.equal(pixels, decode(images)[order]) and len(seeds.unique()) == len(seeds) == len(pixels)
        assert not torch.equal(changed, pixels) and torch.equal(made, loader.augments[STRONG].normalize(changed))


@pytest.mark.parametrize("description", ["hope", "rand-q9", "augmix-x1", ""])
def test_a_description_that_timm_does_not_know_is_named(description):
    with pytest.raises(InputError, match=f"auto_augment='{description}': expected cifar10, trivial, or timm's name"):
        get_policy("cifar").strong(description)


def test_unknown_policies_and_sizes_are_refused():
    known = "cifar, fashion, imagenet, inat"
    with pytest.raises(InputError, match=f"unknown augmentation 'cifar11'; choose one of {known}"):
        get_policy("cifar11")
    for size in (0, -1, 1.5, True, "32"):
        with pytest.raises(InputError, match="not a positive number of pixels"):
            get_policy("cifar").input_size(size)


@pytest.mark.parametrize("name", ["rand-m10-inc1", "rand-m10", "original", "originalr", "v0", "augmix-m10-w3"])
def test_no_operation_posterizes_to_zero_bits(name):
    """Pillow refuses that, so a run would end at the first such draw."""
    operations = [op for op in _operations(AutoAugment(name, 32, MEAN).transform) if op.name.startswith("Posterize")]
    assert operations
    for op in operations:
        for level in range(11):
            (bits,) = op.level_fn(level, op.hparams)
            assert 1 <= bits <= 8
            op.aug_fn(picture(), bits)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("cifar10", T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=[128, 102, 76])),
        ("trivial", T.TrivialAugmentWide(fill=[128, 102, 76])),
    ],
)
def test_torchvisions_policies_are_theirs_bit_for_bit(name, theirs):
    ours = AutoAugment(name, 32, MEAN)
    for seed in range(30):
        torch.manual_seed(seed)
        expected = theirs(picture())
        assert np.array_equal(np.asarray(ours.each([picture()], torch.tensor([seed]))[0]), np.asarray(expected))

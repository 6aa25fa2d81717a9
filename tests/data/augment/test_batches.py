"""Batch augmentation gives torchvision's pixels."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from ride_timm.data.augment.batches import BatchAugment, Draws
from ride_timm.data.augment.images import build_transform
from ride_timm.data.augment.policies import get_policy
from ride_timm.errors import InputError


def random_images(n: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_torchvision(image: torch.Tensor, policy, top: int, left: int, flip: bool, angle: float) -> torch.Tensor:
    """Crop, flip, rotate, then normalise, with the functions that torchvision's own transforms call."""
    size = len(image)
    pil = F.crop(F.pad(Image.fromarray(image.numpy()), policy.padding), top, left, size, size)
    pil = F.hflip(pil) if flip else pil
    return F.normalize(F.to_tensor(F.rotate(pil, angle)), policy.mean, policy.std)


def assert_equal_pixels(augment: BatchAugment, images: torch.Tensor, draws: Draws) -> None:
    out = augment(images, draws)
    for i, image in enumerate(images):
        choice = [value[i].item() for value in draws[:4]]
        assert torch.equal(out[i], by_torchvision(image, augment.policy, *choice)), choice


@pytest.mark.parametrize("name, size", [("cifar", 32), ("cifar", 33), ("fashion", 28)])
def test_batch_pixels_equal_torchvision(name, size):
    augment = BatchAugment(name, size)
    images = random_images(300, size)
    assert_equal_pixels(augment, images, augment.draw(300, torch.Generator().manual_seed(1)))


def test_batch_pixels_equal_torchvision_at_any_angle():
    augment = BatchAugment("cifar")
    draws = augment.draw(200, torch.Generator().manual_seed(2))
    angle = torch.linspace(-400, 400, 200)
    angle[:9] = torch.tensor([0.0, -0.0, 90.0, -90.0, 180.0, 270.0, 360.0, 1e-6, -1e-6])
    assert_equal_pixels(augment, random_images(200, 32), draws._replace(angle=angle))


@pytest.mark.parametrize("top", [0, 4, 8])
@pytest.mark.parametrize("left", [0, 4, 8])
@pytest.mark.parametrize("flip", [False, True])
def test_every_corner_of_the_padding(top, left, flip):
    draws = Draws(torch.tensor([top]), torch.tensor([left]), torch.tensor([flip]), torch.tensor([12.5]))
    assert_equal_pixels(BatchAugment("cifar"), random_images(1, 32), draws)


def test_draws_follow_the_distributions_of_torchvision():
    draws = BatchAugment("cifar").draw(20_000, torch.Generator().manual_seed(0))
    for corner in (draws.top, draws.left):
        counts = torch.bincount(corner, minlength=9)
        assert len(counts) == 9
        assert ((counts - 20_000 / 9).abs() < 5 * (20_000 / 9) ** 0.5).all()
    assert draws.flip.dtype == torch.bool
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.angle.abs().max() <= 15
    assert draws.angle.mean().item() == pytest.approx(0, abs=0.3)
    assert draws.angle.std().item() == pytest.approx(30 / 12**0.5, abs=0.15)
    together = torch.corrcoef(torch.stack([value.float() for value in draws[:4]]))
    assert (together - torch.eye(4)).abs().max() < 0.04


def test_draws_come_from_the_given_generator_alone():
    augment = BatchAugment("fashion")
    state = torch.get_rng_state()
    first, again = (augment.draw(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_of_the_draws_augments_a_part_of_the_batch():
    augment, images = BatchAugment("cifar"), random_images(10, 32)
    draws = augment.draw(10, torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(images, draws)[3:7], augment(images[3:7], draws.part(3, 7)), rtol=0, atol=0)


def test_output_is_channels_last_and_input_untouched():
    augment, images = BatchAugment("cifar"), random_images(5, 32)
    before = images.clone()
    out = augment(images, augment.draw(5, torch.Generator()))
    assert out.shape == (5, 3, 32, 32) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_test_transform_only_normalises_small_images():
    images = random_images(4, 32)
    transform = build_transform("cifar", train=False)
    expected = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    assert torch.equal(BatchAugment("cifar").normalize(images), expected)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(expected, ((images / 255 - mean) / std).permute(0, 3, 1, 2))


def test_policies_of_large_images_are_refused():
    with pytest.raises(InputError, match="augments single images"):
        BatchAugment("imagenet")


@pytest.mark.parametrize("length", [1, 7, 16])
def test_cutout_blackens_the_square_around_the_centre_and_nothing_else(length):
    augment = BatchAugment(get_policy("cifar").strong(None, length))
    images = random_images(6, 32) | 1  # no pixel is black
    hole = torch.tensor([[0, 0], [31, 31], [16, 16], [0, 31], [5, 20], [31, 0]])
    cut = augment.cut(images, hole)
    for image, before, (row, column) in zip(cut, images, hole.tolist(), strict=True):
        expected = before.clone()
        top, left = row - length // 2, column - length // 2
        expected[max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = 0
        assert torch.equal(image, expected)


def test_holes_are_drawn_after_all_else_at_any_pixel():
    plain, cutting = BatchAugment("cifar"), BatchAugment(get_policy("cifar").strong(None, 16))
    draws = [augment.draw(5000, torch.Generator().manual_seed(0)) for augment in (plain, cutting)]
    assert all(torch.equal(a, b) for a, b in zip(draws[0][:4], draws[1][:4], strict=True))
    assert draws[0].hole is None and draws[1].hole.unique().tolist() == list(range(32))
    assert draws[1].part(2, 4).hole.shape == (2, 2)


def test_nothing_is_rotated_where_an_auto_augment_policy_is_on():
    augment = BatchAugment(get_policy("cifar").strong("cifar10"))
    assert augment.draw(50, torch.Generator().manual_seed(0)).angle.abs().max() == 0

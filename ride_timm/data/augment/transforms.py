"""The authors' augmentations, image by image for large images and a whole batch at once for small ones.

arXiv:2010.01809 and its code: CIFAR crops, flips and rotates, ImageNet-LT crops, flips and jitters colours,
iNaturalist crops and flips. A `Policy` is one of these recipes, a row of `POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms as T

from ...errors import InputError
from .auto_augment import TimmAugment
from .reduced_decode import Box, read_resized

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Policy:
    """How images become inputs.

    mean, std: per channel, of pixels in [0, 1].
    size: side of the square input in pixels; resize: shorter side before the centre crop at test time, at that size.
    padding, degrees: of the small images' padded crop and rotation; padding None takes a random resized crop instead.
    jitter: strength of brightness, contrast and saturation changes.
    auto_augment: timm's description of a policy, see `TimmAugment`: before the padded crop, after a random resized one
        and its flip.
    in_memory: the images are small; decode the set once and augment batch by batch.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    resize: int
    padding: int | None = None
    degrees: float = 0.0
    jitter: float = 0.0
    in_memory: bool = False
    auto_augment: str | None = None

    def with_auto_augment(self, description: str) -> Policy:
        """The policy with timm's augmentations of single images on top.

        InputError for a description that timm does not understand.
        """
        TimmAugment(description, self.size, self.mean)
        return replace(self, auto_augment=description)

    def input_size(self, input_size: int | None = None) -> int:
        """The side to use: the given one if any, else the policy's. Raises `InputError` unless it is positive."""
        if input_size is None:
            return self.size
        if isinstance(input_size, bool) or not isinstance(input_size, Integral) or input_size < 1:
            raise InputError(f"input size {input_size!r} is not a positive number of pixels")
        return int(input_size)

    @property
    def crop_pct(self) -> float:
        """timm's name for the test crop over the image it is cut from."""
        return self.size / self.resize

    def resize_at(self, input_size: int) -> int:
        """Shorter image size before the centre crop, floored as timm does."""
        return math.floor(input_size / self.crop_pct)

    def data_config(self, input_size: int) -> dict[str, Any]:
        """The test transform as timm's data config, for a model's config.json."""
        shape = dict(input_size=(3, input_size, input_size), mean=self.mean, std=self.std)
        return shape | dict(crop_pct=self.crop_pct, interpolation="bilinear")


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "size": 224, "resize": 256}
# CIFAR-10's mean and std, for CIFAR-100 too: the authors do not tell them apart
_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "size": 32, "resize": 32}
_INAT = {"mean": (0.466, 0.471, 0.380), "std": (0.195, 0.194, 0.192), "size": 224, "resize": 256}
_FASHION = {"mean": (0.2860,) * 3, "std": (0.3530,) * 3, "size": 28, "resize": 28}

POLICIES = {
    policy.name: policy
    for policy in (
        Policy("cifar", **_CIFAR, padding=4, degrees=15.0, in_memory=True),
        Policy("fashion", **_FASHION, padding=2, degrees=15.0, in_memory=True),
        Policy("imagenet", **_IMAGENET, jitter=0.4),
        Policy("inat", **_INAT),
    )
}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of this name; a `Policy` is passed through. Raises `InputError` for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise InputError(f"unknown augmentation {policy!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[policy]


class Fit:
    """PIL image -> RGB PIL image of size x size: shorter side to `resize` (default `size`), then a centre crop.

    The image need not be decoded yet; a JPEG may then be decoded at reduced size, its shorter side at least `resize`.
    """

    def __init__(self, size: int, resize: int | None = None, reduced_decode: bool = False) -> None:
        self.resize, self.reduced_decode = resize or size, reduced_decode
        self.crop = T.CenterCrop(size)

    def __call__(self, image: Image) -> Image:
        return self.crop(read_resized(image, self.plan, self.reduced_decode))

    def plan(self, width: int, height: int) -> tuple[Box, tuple[int, int]]:
        """The whole image, and the size that torchvision's Resize gives it."""
        short = min(width, height)
        return (0, 0, width, height), (int(self.resize * width / short), int(self.resize * height / short))


class RandomResizedCrop(T.RandomResizedCrop):
    """torchvision's, for an image that need not be decoded yet: PIL image -> RGB PIL image of size x size.

    The box is drawn in the full image; a JPEG may then be decoded at a reduced size at which the box is not smaller
    than the output.
    """

    def __init__(self, size: int, reduced_decode: bool = False) -> None:
        super().__init__(size)
        self.reduced_decode = reduced_decode

    def forward(self, image: Image) -> Image:
        return read_resized(image, self.plan, self.reduced_decode)

    def plan(self, width: int, height: int) -> tuple[Box, tuple[int, int]]:
        """A random box, and the output size."""
        shape = torch.empty(height, width, device="meta")  # get_params looks at the size alone
        top, left, h, w = self.get_params(shape, self.scale, self.ratio)
        return (left, top, left + w, top + h), (self.size[1], self.size[0])


def build_crop(
    policy: str | Policy, train: bool, input_size: int | None = None, reduced_decode: bool = True
) -> Fit | RandomResizedCrop:
    """The first step of a transform: PIL image, best not decoded yet -> RGB PIL image [S, S].

    reduced_decode: large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that is enough; small images never.
    """
    policy = get_policy(policy)
    size = policy.input_size(input_size)
    reduced_decode = reduced_decode and not policy.in_memory
    if not train:
        return Fit(size, policy.resize_at(size), reduced_decode)
    if policy.padding is not None:
        return Fit(size, reduced_decode=reduced_decode)
    return RandomResizedCrop(size, reduced_decode)


def build_augment(policy: str | Policy, train: bool, input_size: int | None = None) -> Callable:
    """What follows the first step: RGB PIL image [S, S] -> normalised float32 [3, S, S]."""
    policy = get_policy(policy)
    steps = []
    if train:
        size, changes = policy.input_size(input_size), []
        if policy.auto_augment is not None:
            changes = [TimmAugment(policy.auto_augment, size, policy.mean)]
        if policy.padding is not None:
            steps += [*changes, T.RandomCrop(size, padding=policy.padding), T.RandomHorizontalFlip()]
        else:
            steps += [T.RandomHorizontalFlip(), *changes]
        steps += [T.RandomRotation(policy.degrees)] if policy.degrees else []
        steps += [T.ColorJitter(policy.jitter, policy.jitter, policy.jitter)] if policy.jitter else []
    return T.Compose([*steps, T.ToTensor(), T.Normalize(policy.mean, policy.std)])


def build_transform(
    policy: str | Policy, train: bool, input_size: int | None = None, reduced_decode: bool = True
) -> Callable:
    """The transform of one image, crop and augmentation: PIL image -> normalised float32 [3, S, S].

    S is `input_size` or the policy's own. Random choices come from torch's global generator, as torchvision's do.
    """
    crop = build_crop(policy, train, input_size, reduced_decode)
    return T.Compose([crop, *build_augment(policy, train, input_size).transforms])


class Draws(NamedTuple):
    """The random choices of a batch, on the CPU: crop corner in the padded image, flip, angle in degrees; each [B]."""

    top: Tensor
    left: Tensor
    flip: Tensor
    angle: Tensor

    def part(self, start: int, stop: int) -> Draws:
        """The choices of the images start … stop-1."""
        return Draws(*(value[start:stop] for value in self))


class BatchAugment:
    """Padded crop, flip, rotation and normalisation of a batch of small images, on whatever device holds them.

    The same pixels as `build_transform` for the same crops, flips and angles: rotation is Pillow's own fixed-point
    nearest neighbour around the centre, black outside. The three maps are composed, so each output pixel is read once.
    """

    def __init__(self, policy: str | Policy, input_size: int | None = None, device: str | torch.device = "cpu") -> None:
        self.policy = get_policy(policy)
        if self.policy.padding is None:
            raise InputError(f"augmentation {self.policy.name!r} works image by image, not on a batch of small images")
        self.size = self.policy.input_size(input_size)
        # one row of the image wide: broadcasting over 3 channels would not vectorise
        self.mean = torch.tensor(self.policy.mean, device=device).repeat(self.size)
        self.std = torch.tensor(self.policy.std, device=device).repeat(self.size)

    def draw(self, num_images: int, generator: torch.Generator) -> Draws:
        """Choices for a batch, distributed as RandomCrop, RandomHorizontalFlip and RandomRotation draw them."""
        num_corners = 2 * self.policy.padding + 1
        return Draws(
            torch.randint(num_corners, (num_images,), generator=generator),
            torch.randint(num_corners, (num_images,), generator=generator),
            torch.rand(num_images, generator=generator) < 0.5,
            (2 * torch.rand(num_images, generator=generator) - 1) * self.policy.degrees,
        )

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """images uint8 [B, S, S, 3] and their draws -> normalised float32 [B, 3, S, S], channels last in memory."""
        return self.normalize(self.warp(images, draws))

    def warp(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop, flip and rotate: uint8 [B, S, S, 3] -> uint8 [B, S, S, 3]."""
        B, S = len(images), self.size
        x_map, y_map, source = self._inverse_maps(draws, images.device).split([3, 3, 6])
        steps = torch.arange(S, dtype=torch.int32, device=images.device)

        def coordinate(step_x: Tensor, step_y: Tensor, start: Tensor) -> Tensor:  # three [B] -> [B, S, S]
            rows = start[:, None] + step_y[:, None] * steps
            return (rows[:, :, None] + (step_x[:, None] * steps)[:, None, :]) >> 16

        x, y = coordinate(*x_map), coordinate(*y_map)
        sign, offset, x_low, x_high, y_low, y_high = source[:, :, None, None]
        # Outside the canvas or outside the image behind the crop, one of these differences is negative, and so is
        # their union: shifted by 31 bits it is all ones. Entry 0 of the gather is black, so masking selects black.
        outside = (x - x_low).bitwise_or_(x_high - x).bitwise_or_(y - y_low).bitwise_or_(y_high - y) >> 31
        index = y.mul_(S).add_(x.mul_(sign)).add_(offset).bitwise_and_(outside.bitwise_not_())
        black = images.new_zeros(1, 3)
        pixels = torch.cat([black, images.reshape(-1, 3)])
        return pixels.index_select(0, index.view(-1)).view(B, S, S, 3)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> float32 [B, 3, S, S], channels last; bit for bit ToTensor and Normalize."""
        B, S = len(images), self.size
        values = images.reshape(B, S, S * 3).to(torch.float32)
        values = values.div_(255).sub_(self.mean).div_(self.std)
        return values.view(B, S, S, 3).permute(0, 3, 1, 2)

    def _inverse_maps(self, draws: Draws, device: torch.device) -> Tensor:
        """From output pixels back to input pixels, int32 [12, B]: the x and y maps of the rotation, 3 rows each, in
        16.16 fixed point (step along x, step along y, start), and what crop and flip make of them, 6 rows: sign of x,
        offset into the flat batch (1 is its first pixel), and the inclusive bounds of x and y inside canvas and image.
        """
        S, pad = self.size, self.policy.padding
        # PIL.Image.rotate, then affine_fixed of its Geometry.c, to the rounding
        angle = -np.radians(draws.angle.double().numpy() % 360.0)
        cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
        centre = S / 2
        x_start = cos * -centre + sin * -centre + centre
        y_start = -sin * -centre + cos * -centre + centre
        x_map = np.stack([cos, sin, x_start + cos * 0.5 + sin * 0.5])
        y_map = np.stack([-sin, cos, y_start - sin * 0.5 + cos * 0.5])
        x_map, y_map = (np.floor(value * 65536.0 + 0.5).astype(np.int32) for value in (x_map, y_map))

        top, left, flip = (value.numpy() for value in draws[:3])
        y_shift = top - pad
        x_shift = left - pad + np.where(flip, S - 1, 0)
        x_sign = np.where(flip, -1, 1)
        x_low = np.where(flip, x_shift - (S - 1), -x_shift).clip(min=0)
        x_high = np.where(flip, x_shift, S - 1 - x_shift).clip(max=S - 1)
        y_low, y_high = (-y_shift).clip(min=0), (S - 1 - y_shift).clip(max=S - 1)
        offset = 1 + np.arange(len(flip)) * S * S + y_shift * S + x_shift
        source = np.stack([x_sign, offset, x_low, x_high, y_low, y_high]).astype(np.int32)
        maps = torch.from_numpy(np.concatenate([x_map, y_map, source]))
        # one copy, from pinned memory: from ordinary memory the GPU would be waited for in every step
        return maps.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else maps.to(device)

"""Augmentation of small images a batch at a time, on any device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...hardware import send
from .auto_augment import CIFAR10
from .batch_policy import BatchPolicy
from .policies import Policy, get_policy


class Draws(NamedTuple):
    """Random choices of a batch: crop corner, flip, degrees; each [B], on the CPU.

    hole: row and column of the centre of Cutout's square, [B, 2], where the policy has one; changes: AutoAugment's,
    [B, 2, 2], see `BatchPolicy`.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    angle: Tensor
    hole: Tensor | None = None
    changes: Tensor | None = None

    def part(self, start: int, stop: int) -> Draws:
        """The draws of images start ... stop-1."""
        return Draws(*(None if value is None else value[start:stop] for value in self))


class BatchAugment:
    """Padded crop, flip, rotation, Cutout and normalisation of a batch of small images.

    Gives the pixels of `build_transform` for the same draws: the rotation is Pillow's fixed-point nearest neighbour
    around the centre, black outside. The three transforms are composed, so each output pixel is read once. Before them
    comes AutoAugment's policy for CIFAR-10, where the policy has it; others are for single images, see `AutoAugment`.
    """

    def __init__(self, policy: str | Policy, input_size: int | None = None, device: str | torch.device = "cpu") -> None:
        self.policy = get_policy(policy)
        padding = self.policy.padding
        if padding is None:
            raise InputError(f"augmentation {self.policy.name!r} augments single images, not batches of small ones")
        self.size, self.padding = self.policy.input_size(input_size), padding
        self.auto_augment = BatchPolicy(self.policy.mean) if self.policy.auto_augment == CIFAR10 else None
        # as wide as a row of the image: broadcasting over 3 channels would not vectorise
        self.mean = torch.tensor(self.policy.mean, device=device).repeat(self.size)
        self.std = torch.tensor(self.policy.std, device=device).repeat(self.size)

    def draw(self, num_images: int, generator: torch.Generator) -> Draws:
        """Draws distributed as in AutoAugment, RandomCrop, RandomHorizontalFlip, RandomRotation."""
        num_corners = 2 * self.padding + 1
        return Draws(
            torch.randint(num_corners, (num_images,), generator=generator),
            torch.randint(num_corners, (num_images,), generator=generator),
            torch.rand(num_images, generator=generator) < 0.5,
            (2 * torch.rand(num_images, generator=generator) - 1) * self.policy.rotation,
            torch.randint(self.size, (num_images, 2), generator=generator) if self.policy.cutout else None,
            self.auto_augment.draw(num_images, generator) if self.auto_augment else None,
        )

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment and normalise a batch.

        images uint8 [B, S, S, 3] and their draws -> float32 [B, 3, S, S], channels last
        """
        if self.auto_augment and draws.changes is not None:
            images = self.auto_augment(images, draws.changes)
        images = self.warp(images, draws)
        if draws.hole is not None:
            images = self.cut(images, draws.hole)
        return self.normalize(images)

    def cut(self, images: Tensor, hole: Tensor) -> Tensor:
        """Cutout: uint8 [B, S, S, 3], centres [B, 2] -> the images with a black square around each centre."""
        start = send(hole, images.device)[..., None] - self.policy.cutout // 2  # [B, 2, 1]
        steps = torch.arange(self.size, device=images.device)
        inside = (steps >= start) & (steps < start + self.policy.cutout)  # [B, 2, S]
        return images.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :])[..., None], 0)

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
        """Normalise a batch, bit for bit as ToTensor and Normalize.

        uint8 [B, S, S, 3] -> float32 [B, 3, S, S], channels last
        """
        B, S = len(images), self.size
        values = images.reshape(B, S, S * 3).to(torch.float32)
        values = values.div_(255).sub_(self.mean).div_(self.std)
        return values.view(B, S, S, 3).permute(0, 3, 1, 2)

    def _inverse_maps(self, draws: Draws, device: torch.device) -> Tensor:
        """Coefficients from output to input pixels, int32 [12, B].

        Rows 0-5: the rotation in 16.16 fixed point, for x and then y (step along x, step along y, start). Rows 6-11:
        crop and flip (sign of x, offset into the flat batch, where 1 is its first pixel, and the inclusive bounds of x
        and y inside canvas and image).
        """
        S, pad = self.size, self.padding
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
        return send(maps, device)  # one copy for all of them

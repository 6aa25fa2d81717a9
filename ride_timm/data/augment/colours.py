"""Colour jitter and normalisation of a batch of large images, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import transforms as T

from .policies import Policy

_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)  # as torchvision's ColorJitter numbers them
_LUMA = (0.299, 0.587, 0.114)  # weights of R, G and B in a grey image, as Pillow has them


def draw_jitter(jitter: T.ColorJitter) -> Tensor:
    """Draw as torchvision's ColorJitter without hue does: the changes (kind, factor) in their order, [3, 2]."""
    order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
    return torch.tensor([(kind, factors[kind]) for kind in order.tolist() if kind <= _SATURATION])


def no_jitter() -> Tensor:
    """Changes that change nothing, [3, 2]."""
    return torch.tensor([(_BRIGHTNESS, 1.0)] * 3)


def jittered(images: Tensor, changes: Tensor) -> Tensor:
    """Apply drawn changes in place, all of them in one pass.

    Each change blends an image with black, its mean grey or its grey image, so together they are a * image + b * grey +
    c with three numbers an image. Values are neither rounded nor, before the last change, clipped to 0 to 255.

    images: float32 [B, 3, H, W], values 0 to 255; changes [B, K, 2].
    """
    red, green, blue = images.unbind(1)
    grey = red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    mean = grey.mean((1, 2))
    a, b, c = torch.ones_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
    for kind, factor in changes.permute(1, 2, 0):  # each [B]
        saturation, contrast = kind == _SATURATION, kind == _CONTRAST
        rest, slope = 1 - factor, a + b  # the grey image is now slope * grey + c
        a, b, c = (
            factor * a,
            factor * b + rest * saturation * slope,
            factor * c + rest * (saturation * c + contrast * (slope * mean + c)),
        )
    a, b, c = (value[:, None, None, None] for value in (a, b, c))
    return images.mul_(a).add_(grey[:, None].mul_(b).add_(c)).clamp_(0, 255)


class BatchColours:
    """Colour jitter and normalisation of a batch; without changes, as ToTensor and Normalize give it bit for bit."""

    def __init__(self, policy: Policy, device: str | torch.device = "cpu") -> None:
        self.mean, self.std = (torch.tensor(value, device=device)[:, None, None] for value in (policy.mean, policy.std))

    def __call__(self, images: Tensor, changes: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] and their changes [B, K, 2] -> float32 [B, 3, H, W], channels last."""
        normalised = torch.empty(
            images.shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last
        )
        # a CPU's cache holds some images, not a batch
        size = 8 if images.device.type == "cpu" else max(1, len(images))
        parts = zip(images.split(size), changes.split(size), normalised.split(size), strict=True)
        for some, drawn, out in parts:
            pixels = some.to(torch.float32)
            if drawn.shape[1]:
                pixels = jittered(pixels, drawn)
            out.copy_(pixels.div_(255).sub_(self.mean).div_(self.std))
        return normalised

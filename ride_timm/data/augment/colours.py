"""Colour jitter and normalisation of a batch of large images, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision import transforms as T

from .policies import Policy

_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)  # as torchvision's ColorJitter numbers them
_LUMA = (19595, 38470, 7471)  # Pillow's weights of R, G and B, of 65536; float32 holds their sums exactly


def draw_jitter(jitter: T.ColorJitter) -> Tensor:
    """Draw as torchvision's ColorJitter without hue does: the changes (kind, factor) in their order, [3, 2]."""
    order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
    return torch.tensor([(kind, factors[kind]) for kind in order.tolist() if kind <= _SATURATION])


def no_jitter() -> Tensor:
    """Changes that change nothing, [3, 2]."""
    return torch.tensor([(_BRIGHTNESS, 1.0)] * 3)


def jittered(images: Tensor, changes: Tensor) -> Tensor:
    """Apply drawn changes in place, with Pillow's pixels.

    images: whole numbers 0 to 255, float32 [B, 3, H, W]; changes [B, K, 2].
    """
    red, green, blue = images.unbind(1)
    for kind, factor in changes.permute(1, 2, 0)[..., None, None]:  # each [B, 1, 1]
        grey = red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
        grey = grey.add_(32768).mul_(1 / 65536).floor_()
        mean = grey.mean((1, 2), keepdim=True).add_(0.5).floor_()
        end = grey.mul_(kind == _SATURATION).add_(mean * (kind == _CONTRAST))[:, None]  # black for brightness
        images.sub_(end).mul_(factor[:, None]).add_(end).clamp_(0, 255).floor_()
    return images


class BatchColours:
    """Colour jitter and normalisation of a batch, as ToTensor and Normalize give it bit for bit."""

    def __init__(self, policy: Policy, device: str | torch.device = "cpu") -> None:
        self.mean, self.std = (torch.tensor(value, device=device)[:, None, None] for value in (policy.mean, policy.std))

    def __call__(self, images: Tensor, changes: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] and their changes [B, K, 2] -> float32 [B, 3, H, W], channels last."""
        normalised = torch.empty(
            images.shape, dtype=torch.float32, device=images.device, memory_format=torch.channels_last
        )
        # a CPU's cache holds an image, not a batch
        size = 1 if images.device.type == "cpu" else max(1, len(images))
        parts = zip(images.split(size), changes.split(size), normalised.split(size), strict=True)
        for some, drawn, out in parts:
            pixels = jittered(some.to(torch.float32), drawn)
            out.copy_(pixels.div_(255).sub_(self.mean).div_(self.std))
        return normalised

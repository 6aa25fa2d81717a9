"""AutoAugment's policy for CIFAR-10, a batch at a time, on any device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import atan, degrees
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as F

from ...hardware import send

_LEVELS = 9  # the strongest; the policy's levels are 0 to 9


def _affine(images: Tensor, fill: list[float], **change: Any) -> Tensor:
    return F.affine(images, **(dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0], fill=fill) | change))


def _shear(slope: float) -> float:
    return degrees(atan(slope))


def _shift(strength: float, images: Tensor) -> int:
    return int(150 / 331 * images.shape[-1] * strength)


# Each changes images uint8 [b, 3, S, S] by a strength from 0 to 1, or -1 to 1 for those of _SIGNED.
_OPERATIONS: dict[str, Callable[[Tensor, float, list[float]], Tensor]] = {
    "ShearX": lambda x, strength, fill: _affine(x, fill, shear=[_shear(0.3 * strength), 0.0], center=[0, 0]),
    "ShearY": lambda x, strength, fill: _affine(x, fill, shear=[0.0, _shear(0.3 * strength)], center=[0, 0]),
    "TranslateX": lambda x, strength, fill: _affine(x, fill, translate=[_shift(strength, x), 0]),
    "TranslateY": lambda x, strength, fill: _affine(x, fill, translate=[0, _shift(strength, x)]),
    "Rotate": lambda x, strength, fill: F.rotate(x, 30 * strength, fill=fill),
    "Brightness": lambda x, strength, fill: F.adjust_brightness(x, 1 + 0.9 * strength),
    "Color": lambda x, strength, fill: F.adjust_saturation(x, 1 + 0.9 * strength),
    "Contrast": lambda x, strength, fill: F.adjust_contrast(x, 1 + 0.9 * strength),
    "Sharpness": lambda x, strength, fill: F.adjust_sharpness(x, 1 + 0.9 * strength),
    "Posterize": lambda x, strength, fill: F.posterize(x, 8 - round(4 * strength)),
    "Solarize": lambda x, strength, fill: F.solarize(x, 255 * (1 - strength)),
    "AutoContrast": lambda x, strength, fill: F.autocontrast(x),
    "Equalize": lambda x, strength, fill: F.equalize(x),
    "Invert": lambda x, strength, fill: F.invert(x),
}
_NAMES = list(_OPERATIONS)
_SIGNED = _NAMES[: _NAMES.index("Posterize")]
_NONE = -1


class BatchPolicy:
    """AutoAugment's policy for CIFAR-10 on a batch: uint8 [B, S, S, 3] -> uint8 [B, S, S, 3].

    Images with the same change are changed together, by torchvision's functions for tensors. mean: colour per channel,
    for pixels in [0, 1], that fills uncovered pixels. Cubuk et al. 2019, arXiv:1805.09501, table 7.
    """

    def __init__(self, mean: tuple[float, float, float]) -> None:
        self.fill = [float(round(255 * value)) for value in mean]
        policies = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10).policies
        steps = [[(_NAMES.index(name), chance, level or 0) for name, chance, level in policy] for policy in policies]
        self.kinds, self.chances, self.levels = torch.tensor(steps, dtype=torch.float64).unbind(-1)  # each [P, 2]

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Draw a sub-policy for each image: its changes (operation, strength), [B, 2, 2]; operation -1 for none."""
        chosen = torch.randint(len(self.kinds), (num_images,), generator=generator)
        draws = torch.rand(num_images, 2, generator=generator)
        signs = 1 - 2 * torch.randint(2, (num_images, 2), generator=generator)
        kinds, strengths = self.kinds[chosen], self.levels[chosen] / _LEVELS
        strengths = torch.where(kinds < len(_SIGNED), signs * strengths, strengths)
        return torch.stack([kinds.masked_fill(draws > self.chances[chosen], _NONE), strengths], -1)

    def __call__(self, images: Tensor, changes: Tensor) -> Tensor:
        """Apply drawn changes."""
        images = images.permute(0, 3, 1, 2).contiguous()
        for step in changes.unbind(1):
            groups = defaultdict(list)
            for row, (kind, strength) in enumerate(step.tolist()):
                if kind != _NONE:
                    groups[int(kind), strength].append(row)
            for (kind, strength), rows in groups.items():
                index = send(torch.tensor(rows), images.device)
                changed = _OPERATIONS[_NAMES[kind]](images.index_select(0, index), strength, self.fill)
                images.index_copy_(0, index, changed)
        return images.permute(0, 2, 3, 1)

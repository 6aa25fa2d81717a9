"""AutoAugment's policy for CIFAR-10, a batch at a time, on any device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import cos, radians, sin

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as F

from ...hardware import send

_LEVELS = 9  # the strongest; the policy's levels are 0 to 9


# Each gives the matrix from output to input pixels around the centre, for a strength from -1 to 1 and the image size.
_GEOMETRIC: dict[str, Callable[[float, int], list[list[float]]]] = {
    "ShearX": lambda strength, size: [[1, 0.3 * strength, 0.15 * strength * size], [0, 1, 0]],  # along the upper edge
    "ShearY": lambda strength, size: [[1, 0, 0], [0.3 * strength, 1, 0.15 * strength * size]],
    "TranslateX": lambda strength, size: [[1, 0, -int(150 / 331 * size * strength)], [0, 1, 0]],
    "TranslateY": lambda strength, size: [[1, 0, 0], [0, 1, -int(150 / 331 * size * strength)]],
    "Rotate": lambda strength, size: _rotation(radians(30 * strength)),
}
# Each gives the amount of an operation for a strength from 0 to 1, or -1 to 1 for those of _SIGNED.
_AMOUNTS: dict[str, Callable[[float], float]] = {
    "Brightness": lambda strength: 1 + 0.9 * strength,
    "Color": lambda strength: 1 + 0.9 * strength,
    "Contrast": lambda strength: 1 + 0.9 * strength,
    "Sharpness": lambda strength: 1 + 0.9 * strength,
    "Posterize": lambda strength: 256 - 2 ** round(4 * strength),
    "Solarize": lambda strength: 255 * (1 - strength),
    "AutoContrast": lambda strength: 0,
    "Equalize": lambda strength: 0,
    "Invert": lambda strength: 0,
}
# Each changes images uint8 [b, 3, S, S] by amounts, and the rest of them to 1, float32 [b, 1, 1, 1].
_OF_COLOURS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Brightness": lambda images, amounts, rests: _to_pixels(images * amounts),
    "Color": lambda images, amounts, rests: _blend(images, _grey(images), amounts, rests),
    "Contrast": lambda images, amounts, rests: _blend(images, _grey(images).mean((1, 2, 3), True), amounts, rests),
    "Sharpness": lambda images, amounts, rests: _sharpen(images, rests),
    "Posterize": lambda images, amounts, rests: images & amounts.to(torch.uint8),
    "Solarize": lambda images, amounts, rests: torch.where(images >= amounts, 255 - images, images),
    "AutoContrast": lambda images, amounts, rests: F.autocontrast(images),
    "Equalize": lambda images, amounts, rests: F.equalize(images),
    "Invert": lambda images, amounts, rests: F.invert(images),
}
_NAMES = [*_GEOMETRIC, *_OF_COLOURS]
_SIGNED = _NAMES[: _NAMES.index("Posterize")]
_NONE = -1


def _rotation(angle: float) -> list[list[float]]:
    return [[cos(angle), -sin(angle), 0], [sin(angle), cos(angle), 0]]


# torchvision's arithmetic, with an amount for each image: addcmul rounds as its `add(…, alpha=…)` does, once


def _to_pixels(images: Tensor) -> Tensor:
    return images.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, 1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blend(images: Tensor, others: Tensor, amounts: Tensor, rests: Tensor) -> Tensor:
    return _to_pixels((images * amounts).addcmul_(others, rests))


def _sharpen(images: Tensor, rests: Tensor) -> Tensor:
    sharpened = images.float()
    kernel = torch.full((3, 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1].fill_(5 / 13)  # made on the device: a copy from a list would wait for the GPU
    inner = sharpened[:, :, 1:-1, 1:-1]
    inner.addcmul_(conv2d(sharpened, kernel, groups=3).round_().sub_(inner), rests)
    return _to_pixels(sharpened)


class BatchPolicy:
    """AutoAugment's policy for CIFAR-10 on a batch: uint8 [B, S, S, 3] -> uint8 [B, S, S, 3].

    Images that are moved are moved together; so are those with the same change of colours, of any strength. The pixels
    are those of torchvision's functions for tensors. mean: colour per channel, for pixels in [0, 1], that fills
    uncovered pixels. Cubuk et al. 2019, arXiv:1805.09501, table 7.
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
            moved: dict[int, list[list[float]]] = {}
            groups: dict[str, dict[int, float]] = defaultdict(dict)
            for row, (kind, strength) in enumerate(step.tolist()):
                name = _NAMES[int(kind)] if kind != _NONE else None
                if name in _GEOMETRIC:
                    moved[row] = _GEOMETRIC[name](strength, images.shape[-1])
                elif name is not None:
                    groups[name][row] = _AMOUNTS[name](strength)
            if moved:
                index = send(torch.tensor([*moved]), images.device)
                matrices = send(torch.tensor([*moved.values()], dtype=torch.float32), images.device)
                images.index_copy_(0, index, self.move(images.index_select(0, index), matrices))
            if groups:
                self.recolour(images, groups)
        return images.permute(0, 2, 3, 1)

    def recolour(self, images: Tensor, groups: dict[str, dict[int, float]]) -> None:
        """Change colours in place; groups: amount of each image, by its row, for each operation."""
        sizes = [len(group) for group in groups.values()]
        index = send(torch.tensor([row for group in groups.values() for row in group]), images.device)
        amounts = torch.tensor([amount for group in groups.values() for amount in group.values()], dtype=torch.float64)
        both = send(torch.stack([amounts, 1 - amounts]).float()[..., None, None, None], images.device)
        for name, rows, (given, rests) in zip(groups, index.split(sizes), both.split(sizes, 1), strict=True):
            images.index_copy_(0, rows, _OF_COLOURS[name](images.index_select(0, rows), given, rests))

    def move(self, images: Tensor, matrices: Tensor) -> Tensor:
        """Move images by a matrix each, the nearest pixel, as torchvision's `affine` does by one for all.

        images uint8 [b, 3, S, S], matrices [b, 2, 3] from output to input pixels around the centre
        """
        S = images.shape[-1]
        steps = torch.arange(S, dtype=torch.float32, device=images.device) + 0.5 - S / 2
        places = torch.stack([*torch.meshgrid(steps, steps, indexing="xy"), torch.ones_like(steps).expand(S, S)], -1)
        grid = (places.view(1, S * S, 3) @ (matrices / (S / 2)).mT).view(-1, S, S, 2)
        masked = pad(images.float(), (0, 0, 0, 0, 0, 1), value=1.0)  # a fourth channel of ones, 0 outside once moved
        moved = grid_sample(masked, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        moved, inside = moved.split([3, 1], 1)
        fill = send(torch.tensor(self.fill), images.device)[:, None, None]
        return torch.where(inside > 0.5, moved, fill).to(torch.uint8)

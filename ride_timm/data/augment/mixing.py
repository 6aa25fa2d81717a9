"""Changes of training batches, by timm: random erasing, mixup, CutMix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ...errors import InputError


class MixedTargets(NamedTuple):
    """Targets of mixed images: [B], [B], and the fraction of the first, a scalar."""

    targets: Tensor
    others: Tensor
    fraction: Tensor


BatchChange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | MixedTargets]]


class Erasing:
    """Random erasing: zero a rectangle of an image, 2 to 33 % of its area.

    Zero is the policy's mean colour.

    probability: per image; views: the batch holds so many views of each image, view by view, and the first is never
    erased. Draws come from Python's `random`, so they depend on the number of processes. Raises `InputError` for a
    probability outside (0, 1]. Zhong et al. 2020, arXiv:1708.04896.
    """

    def __init__(self, probability: float, views: int = 1) -> None:
        if not 0 < probability <= 1:
            raise InputError(f"random_erasing={probability}: expected a probability above 0, at most 1")
        self.erase = RandomErasing(probability, num_splits=views)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Erase images [B, C, H, W], normalised, in place; targets are unchanged."""
        self.erase.device = images.device
        return self.erase(images), targets


class Mixing:
    """mixup or CutMix of a batch with itself in reverse order.

    One fraction per batch is drawn, from NumPy's generator.

    mixup_alpha, cutmix_alpha: parameters of the fraction's Beta distribution; 0 turns that kind off, and with both on
    one is chosen at random for every batch. In an odd batch the last image is not mixed. Raises `InputError` unless one
    is above 0. Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899.
    """

    def __init__(self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        if not (mixup_alpha >= 0 and cutmix_alpha >= 0 and mixup_alpha + cutmix_alpha > 0):
            raise InputError(
                f"mixing needs an alpha above 0, got mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}"
            )
        self.mixup = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=2)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, MixedTargets]:
        """Mix images [B, ...] in place, and targets [B]."""
        paired = len(images) - len(images) % 2
        fraction = torch.ones((), device=images.device)
        if paired:
            # timm gives soft targets; with the halves as two classes, the first image's target is the fraction itself
            halves = torch.arange(paired, device=images.device) // (paired // 2)
            fraction = self.mixup(images[:paired], halves)[1][0, 0]
        others = torch.cat([targets[:paired].flip(0), targets[paired:]])
        return images, MixedTargets(targets, others, fraction)


def batch_changes(
    random_erasing: float = 0.0, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, views: int = 1
) -> list[BatchChange]:
    """Changes to apply to training batches, in this order.

    views: per image in a batch, see `Erasing`.
    """
    changes: list[BatchChange] = []
    if random_erasing:
        changes.append(Erasing(random_erasing, views))
    if mixup_alpha or cutmix_alpha:
        changes.append(Mixing(mixup_alpha, cutmix_alpha))
    return changes

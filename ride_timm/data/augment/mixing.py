"""What is done to whole batches of training images, by timm: random erasing, mixup, CutMix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ...errors import InputError


class MixedTargets(NamedTuple):
    """Targets of mixed images: `share` of each image has the first label, the rest the second; [B], [B], scalar."""

    targets: Tensor
    others: Tensor
    share: Tensor


BatchChange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | MixedTargets]]


class Erasing:
    """Covers a rectangle of an image, 2 to 33 % of its area, with zero, which is the policy's mean colour.

    probability: of each image. views: of several views of the images in a batch, one after the other, the first stays
    whole. The draws are those of Python's `random`, so a batch's depend on the number of processes. InputError for a
    probability out of (0, 1]. Zhong et al. 2020, arXiv:1708.04896.
    """

    def __init__(self, probability: float, views: int = 1) -> None:
        if not 0 < probability <= 1:
            raise InputError(f"random_erasing={probability}: expected a probability above 0, at most 1")
        self.erase = RandomErasing(probability, num_splits=views)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, C, H, W], normalised, changed in place, and targets as they are."""
        self.erase.device = images.device
        return self.erase(images), targets


class Mixing:
    """Mixes each image of a batch with its mirror place's: one share for the batch, drawn from NumPy's generator.

    mixup_alpha, cutmix_alpha: parameters of the Beta distribution of the share; 0 turns that kind off, with both on
    one of them is tossed for every batch. InputError unless one is above 0. Of an odd batch the last image stays as
    it is. Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899.
    """

    def __init__(self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        if not (mixup_alpha >= 0 and cutmix_alpha >= 0 and mixup_alpha + cutmix_alpha > 0):
            raise InputError(
                f"mixing needs an alpha above 0, got mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}"
            )
        self.mixup = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=2)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, MixedTargets]:
        """images [B, …], changed in place, and targets [B] -> the mixed images and their targets."""
        paired = len(images) - len(images) % 2
        share = torch.ones((), device=images.device)
        if paired:
            # timm gives soft targets; of two classes, one in each half, the first image's target is the share itself
            halves = torch.arange(paired, device=images.device) // (paired // 2)
            share = self.mixup(images[:paired], halves)[1][0, 0]
        others = torch.cat([targets[:paired].flip(0), targets[paired:]])
        return images, MixedTargets(targets, others, share)


def batch_changes(
    random_erasing: float = 0.0, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, views: int = 1
) -> list[BatchChange]:
    """The changes of whole training batches, in this order; views: of each image in a batch, the first stays as is."""
    changes: list[BatchChange] = []
    if random_erasing:
        changes.append(Erasing(random_erasing, views))
    if mixup_alpha or cutmix_alpha:
        changes.append(Mixing(mixup_alpha, cutmix_alpha))
    return changes

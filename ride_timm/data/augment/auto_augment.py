"""AutoAugment and its kind, by timm and torchvision."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import (
    AugmentOp,
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from torch import Tensor
from torchvision import transforms as T

from ...errors import InputError

CIFAR10 = "cifar10"  # the policy that AutoAugment found there; `BatchPolicy` changes whole batches by it
_TORCHVISION: dict[str, Callable[[list[float]], Callable[[Image.Image], Image.Image]]] = {
    CIFAR10: lambda fill: T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=fill),
    "trivial": lambda fill: T.TrivialAugmentWide(fill=fill),
}


def _operations(transform: Any) -> list[AugmentOp]:
    """All operations of a policy of timm's: in a list, or in a list of sub-policies."""
    nested = transform.policy if hasattr(transform, "policy") else transform.ops
    return [op for item in nested for op in (item if isinstance(item, list) else [item])]


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: Any) -> tuple[int]:
    """Keep a bit: Pillow refuses to posterize to none, which timm's strongest levels ask for."""
    return (max(1, level_fn(level, hparams)[0]),)


class AutoAugment:
    """AutoAugment, RandAugment, AugMix or TrivialAugment: RGB PIL image -> RGB PIL image.

    description: torchvision's "cifar10", which AutoAugment found for CIFAR-10, or "trivial"; or timm's name of
    a policy, such as "rand-m9-mstd0.5" or "original". mean: colour per channel, for pixels in [0, 1], that fills
    uncovered pixels. timm draws from Python's and NumPy's global generators: they are seeded from torch's for each
    image, and all are restored afterwards, so every random choice follows from torch's generator.

    Raises `InputError` for an unknown description. Cubuk et al. 2019, arXiv:1805.09501; 2020, arXiv:1909.13719;
    Hendrycks et al. 2020, arXiv:1912.02781; Müller and Hutter 2021, arXiv:2103.10158.
    """

    def __init__(self, description: str, size: int, mean: tuple[float, float, float]) -> None:
        fill = tuple(min(255, round(255 * value)) for value in mean)
        if description in _TORCHVISION:
            self.transform = _TORCHVISION[description](list(fill))
            return
        params = dict(translate_const=int(size * 0.45), img_mean=fill)  # the values of timm's own transforms
        kind = description.split("-")[0]
        make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(kind, auto_augment_transform)
        if kind == "augmix":
            params["translate_pct"] = 0.3
        try:
            self.transform = make(description, params)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"auto_augment={description!r}: expected cifar10, trivial, or timm's name of a policy, such as "
                f"rand-m9-mstd0.5, original or augmix-m3-w3 ({str(error) or type(error).__name__})"
            ) from error
        for op in _operations(self.transform):
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_at_least_one_bit, op.level_fn)  # no closure: workers may be spawned

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.each([image], torch.randint(2**32, (1,)))[0]

    def each(self, images: Iterable[Image.Image], seeds: Tensor) -> list[Image.Image]:
        """Augment each image with a seed of its own, in [0, 2**32)."""
        state, numpy_state, changed = random.getstate(), np.random.get_state(), []
        try:
            with torch.random.fork_rng(devices=[]):
                for image, seed in zip(images, seeds.tolist(), strict=True):
                    random.seed(seed)
                    np.random.seed(seed)
                    torch.default_generator.manual_seed(seed)
                    changed.append(self.transform(image))
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
        return changed

    def batch(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Augment images uint8 [B, S, S, 3] with a seed each, on the CPU."""
        changed = self.each(map(Image.fromarray, images.numpy()), seeds)
        return torch.from_numpy(np.stack([np.asarray(image) for image in changed]))

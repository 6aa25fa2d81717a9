"""timm's AutoAugment, RandAugment and AugMix on PIL images, drawn from torch's generator as all other choices are."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor

from ...errors import InputError


class TimmAugment:
    """RGB PIL image -> RGB PIL image, by timm's description of a policy such as "rand-m9-mstd0.5" or "original".

    mean: colour per channel, of pixels in [0, 1], that fills what a shift or a turn uncovers. timm draws from Python's
    and NumPy's global generators; they are seeded here by torch's and given back as they were, so that a sample's
    choices follow from its place in the epoch. InputError for a description that timm does not understand. Cubuk et al.
    2020, arXiv:1909.13719; 2019, arXiv:1805.09501; Hendrycks et al. 2020, arXiv:1912.02781.
    """

    def __init__(self, description: str, size: int, mean: tuple[float, float, float]) -> None:
        fill = tuple(min(255, round(255 * value)) for value in mean)
        params = dict(translate_const=int(size * 0.45), img_mean=fill)  # as timm's own transforms have it
        kind = description.split("-")[0]
        make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(kind, auto_augment_transform)
        if kind == "augmix":
            params["translate_pct"] = 0.3
        try:
            self.transform = make(description, params)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"auto_augment={description!r}: expected timm's words for a policy, such as rand-m9-mstd0.5, original, "
                f"v0 or augmix-m3-w3 ({str(error) or type(error).__name__})"
            ) from error

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.each([image], torch.randint(2**32, (1,)))[0]

    def each(self, images: Iterable[Image.Image], seeds: Tensor) -> list[Image.Image]:
        """Every image changed by what its own seed, from [0, 2**32), draws."""
        state, numpy_state, changed = random.getstate(), np.random.get_state(), []
        try:
            for image, seed in zip(images, seeds.tolist(), strict=True):
                random.seed(seed)
                np.random.seed(seed)
                changed.append(self.transform(image))
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
        return changed

    def batch(self, images: Tensor, seeds: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] and a seed for each image -> the same, changed; on the CPU."""
        changed = self.each(map(Image.fromarray, images.numpy()), seeds)
        return torch.from_numpy(np.stack([np.asarray(image) for image in changed]))

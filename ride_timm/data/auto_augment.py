"""timm's AutoAugment, RandAugment and AugMix on PIL images, drawn from torch's generator as all other choices are."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


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

    def __call__(self, image: Image) -> Image:
        state, numpy_state = random.getstate(), np.random.get_state()
        seed = int(torch.randint(2**32, ()))
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.transform(image)
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)

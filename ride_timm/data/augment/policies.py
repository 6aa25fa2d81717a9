"""Augmentation policies by family of data sets, and by backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from timm.models import PretrainedCfg, get_pretrained_cfg

from ...errors import InputError
from .auto_augment import AutoAugment

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Policy:
    """How images become inputs, for training and testing.

    mean, std: per channel, for pixels in [0, 1].
    size: default input size in pixels; crop_pct: test crop over resized image, as timm defines it.
    interpolation: of every resize, "bilinear" or "bicubic"; squash: the test transform resizes to a square, keeping no
        aspect ratio, as timm's crop_mode "squash".
    padding, degrees: padded crop and rotation of small images; without padding, a random resized crop instead.
    jitter: strength of the brightness, contrast and saturation changes; AutoAugment takes their place, as in timm.
    in_memory: decode the set once, hold it in memory and augment it batch by batch.
    auto_augment: name of a policy, see `AutoAugment`; applied before the padded crop, or after the random
        resized crop and its flip. It takes the place of the rotation as well, as in the recipes that use both.
    cutout: edge in pixels of a black square at a random place, which may reach over the border; after all else. DeVries
        and Taylor 2017, arXiv:1708.04552.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    squash: bool = False
    padding: int | None = None
    degrees: float = 0.0
    jitter: float = 0.0
    in_memory: bool = False
    auto_augment: str | None = None
    cutout: int = 0

    def strong(self, auto_augment: str | None, cutout: int = 0) -> Policy:
        """The policy with AutoAugment and Cutout; `InputError` for an unknown description."""
        if auto_augment is not None:
            AutoAugment(auto_augment, self.size, self.mean)
        return replace(self, auto_augment=auto_augment, cutout=cutout)

    @property
    def weak(self) -> Policy:
        """The policy without AutoAugment and Cutout: the first of two views."""
        return replace(self, auto_augment=None, cutout=0)

    @property
    def rotation(self) -> float:
        """Largest rotation in training, in degrees."""
        return self.degrees if self.auto_augment is None else 0.0

    def input_size(self, input_size: int | None = None) -> int:
        """The given input size, or the policy's default.

        Raises `InputError` unless it is a positive integer.
        """
        if input_size is None:
            return self.size
        if isinstance(input_size, bool) or not isinstance(input_size, Integral) or input_size < 1:
            raise InputError(f"input size {input_size!r} is not a positive number of pixels")
        return int(input_size)

    def resize_at(self, input_size: int) -> int:
        """Shorter image size before the centre crop, floored as timm does."""
        return math.floor(input_size / self.crop_pct)

    def data_config(self, input_size: int) -> dict[str, Any]:
        """The test transform as timm's data config, for a model's config.json."""
        shape: dict[str, Any] = dict(input_size=(3, input_size, input_size), mean=self.mean, std=self.std)
        shape |= dict(crop_mode="squash") if self.squash else {}
        return shape | dict(crop_pct=self.crop_pct, interpolation=self.interpolation)


_CIFAR = Policy(
    "cifar",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    size=32,
    padding=4,
    degrees=15.0,
    in_memory=True,
)
_FASHION = Policy(
    "fashion",
    mean=(0.2860, 0.2860, 0.2860),
    std=(0.3530, 0.3530, 0.3530),
    size=28,
    padding=2,
    degrees=15.0,
    in_memory=True,
)
_IMAGENET = Policy(
    "imagenet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224, crop_pct=0.875, jitter=0.4
)
_INAT = Policy("inat", mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192), size=224, crop_pct=0.875)
# arXiv:2010.01809 and its code: CIFAR crops, flips and rotates; ImageNet-LT crops, flips and jitters; iNat crops, flips
POLICIES = {policy.name: policy for policy in (_CIFAR, _FASHION, _IMAGENET, _INAT)}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of this name; a `Policy` is passed through.

    Raises `InputError` for an unknown name.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise InputError(f"unknown augmentation {policy!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[policy]


def backbone_policy(model: str) -> Policy:
    """The policy that a timm network's weights expect, see `policy_of`.

    Raises `InputError` for a name that timm does not know, or a network of other than 3 channels, as well.
    """
    try:
        cfg = get_pretrained_cfg(model)
    except RuntimeError as error:
        raise InputError(f"backbone={model!r}: {error}") from error
    if cfg is None:
        raise InputError(f"backbone={model!r}: timm has no such model.")
    if cfg.input_size[0] != 3:
        raise InputError(f"backbone={model!r} expects input {cfg.input_size}: expected 3 channels; choose another.")
    return policy_of(cfg, f"backbone={model!r}")


def policy_of(cfg: PretrainedCfg, name: str) -> Policy:
    """The policy of timm's cfg of a network: its size, crop, interpolation and normalisation.

    Images for training are cropped at random, flipped and jittered in colour. Raises `InputError` for a cfg with
    another crop.
    """
    _, height, width = cfg.input_size
    if height != width or cfg.crop_mode not in ("center", "squash"):
        raise InputError(
            f"{name} expects input {cfg.input_size} cropped by {cfg.crop_mode!r}; expected a square, and crop mode "
            "center or squash: name its --augment, or choose another."
        )
    interpolation = cfg.interpolation if cfg.interpolation in INTERPOLATIONS else "bicubic"
    return Policy(
        "backbone",
        mean=cfg.mean,
        std=cfg.std,
        size=height,
        crop_pct=cfg.crop_pct,
        interpolation=interpolation,
        squash=cfg.crop_mode == "squash",
        jitter=0.4,
    )

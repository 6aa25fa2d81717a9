"""RIDE on the CIFAR ResNet-32: layer2, layer3 and the head per expert."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from .create import Parts, create_ride, ride_cfg
from .experts import Expert, Stages
from .heads import CosineClassifier
from .release import with_releases
from .ride import Ride
from .ride_resnet import residual_stage
from .router import Router


class PadShortcut(nn.Module):
    """Option-A shortcut: every second pixel, padded with zero channels.

    x [B, in, H, W] -> [B, out, H/2, W/2], (out - in) // 2 zero channels before, the rest after.
    arXiv:1512.03385, section 3.3
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # keeps the gradient channels-last, too, as the convolution's it is added to
        return F.pad(x[:, ::2, ::2], self.padding).permute(0, 3, 1, 2)


def _pad_shortcut(in_channels: int, out_channels: int, stride: int) -> PadShortcut:
    return PadShortcut(in_channels, out_channels)  # every stage that needs a shortcut has stride 2


def _init_weights(module: nn.Module) -> None:
    # The authors' initialisation: He-normal by fan-in, the router's layers included.
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Linear) and not isinstance(child, CosineClassifier):
            nn.init.kaiming_normal_(child.weight)


class CifarRide(Ride):
    """`Ride` with He-normal initialisation by fan-in, as the authors have it.

    A router or classifiers added later are initialised alike.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _init_weights(self)

    def add_router(self, router: Router) -> None:
        _init_weights(router)
        super().add_router(router)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        for expert in self.experts:
            _init_weights(expert.fc)


def resnet_cifar_parts(
    num_classes: int,
    in_chans: int,
    layers: tuple[int, int, int] = (5, 5, 5),
    global_pool: str = "fastavg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    reduce_dimension: bool = True,
    use_norm: bool = True,
    layer2_output_dim: int | None = None,
    layer3_output_dim: int | None = None,
    share_layer2: bool = False,
) -> Parts:
    """Share the 3x3 stem and layer1 (16 channels), with `share_layer2` layer2 as well; the rest per expert.

    Channels of layer2 and layer3: 24 and 48 reduced, 32 and 64 full. The other arguments are those of `resnet_parts`.
    """
    narrow, wide = (24, 48) if reduce_dimension else (32, 64)
    channels = (16, 16, layer2_output_dim or narrow, layer3_output_dim or wide)
    drop_paths = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
    for i in (2, 3):
        if channels[i] < channels[i - 1]:
            raise ValueError(
                f"layer{i}_output_dim={channels[i]}: option-A shortcuts only widen, expected {channels[i - 1]} or more."
            )

    def stages(stem: dict[str, nn.Module], numbers: range) -> Stages:
        info = [dict(num_chs=16, reduction=1, module="act1")] if stem else []
        info += [dict(num_chs=channels[i], reduction=2 ** (i - 1), module=f"layer{i}") for i in numbers]
        made = {}
        for i in numbers:
            where = (channels[i - 1], channels[i], drop_paths[i - 1], 1 if i == 1 else 2)
            made[f"layer{i}"] = residual_stage(BasicBlock, *where, _pad_shortcut)
        return Stages({**stem, **made}, info)

    stem = {
        "conv1": nn.Conv2d(in_chans, 16, kernel_size=3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(16),
        "act1": nn.ReLU(inplace=True),
    }

    first_own = 3 if share_layer2 else 2

    def make_expert() -> Expert:
        return Expert(stages({}, range(first_own, 4)), channels[3], num_classes, use_norm, global_pool, drop_rate)

    return stages(stem, range(1, first_own)), make_expert


_CIFAR_STATS = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
_CIFAR_INPUT = dict(input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0)

_CIFAR100 = dict(num_classes=100, **_CIFAR_INPUT, **_CIFAR_STATS)
_FASHION_INPUT = dict(input_size=(3, 28, 28), pool_size=(7, 7), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    with_releases(
        {
            "ride_resnet32.cifar100_lt100": ride_cfg(**_CIFAR100),
            "ride_resnet32.cifar100_lt100_mutual": ride_cfg(**_CIFAR100),
            "ride_resnet32.cifar100_lt100_zoo": ride_cfg(**_CIFAR100),
            "ride_resnet32.cifar100_lt100_distill": ride_cfg(**_CIFAR100),
            "ride_resnet32.cifar100_lt100_distill_4experts": ride_cfg(**_CIFAR100),
            "ride_resnet32.cifar100_lt100_6experts": ride_cfg(**_CIFAR100),
            "ride_resnet32.cifar10_lt100": ride_cfg(num_classes=10, **_CIFAR_INPUT, **_CIFAR_STATS),
            "ride_resnet32.fashion_lt": ride_cfg(num_classes=10, **_FASHION_INPUT, mean=(0.286,) * 3, std=(0.353,) * 3),
        }
    )
)


@register_model
def ride_resnet32(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNet-32 for CIFAR, stem and stage 1 shared; without a tag it has 100 classes."""
    levels = (0, 1, 2, 3)
    return create_ride(resnet_cifar_parts, "ride_resnet32", pretrained, levels=levels, model_cls=CifarRide, **kwargs)

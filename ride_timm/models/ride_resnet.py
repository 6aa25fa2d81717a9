"""RIDE on ResNet and ResNeXt: layer3, layer4 and the head per expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import nn

from .create import Parts, create_ride, ride_cfg
from .experts import Expert, Stages
from .release import with_releases
from .ride import Ride

FULL_PLANES = (64, 128, 256, 512)
REDUCED_PLANES = (64, 128, 192, 384)


def _conv_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return downsample_conv(in_channels, out_channels, kernel_size=1, stride=stride)


def residual_stage(
    block: Any,
    in_channels: int,
    planes: int,
    drop_path_rates: list[float],
    stride: int,
    make_shortcut: Callable[[int, int, int], nn.Module],
    **block_args: Any,
) -> nn.Sequential:
    """Build a stage of one residual block per drop path rate.

    The first block has the stride and, if shapes change, the shortcut.
    make_shortcut: (in_channels, out_channels, stride) -> the first block's shortcut.
    """
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = make_shortcut(in_channels, out_channels, stride)
    blocks: list[nn.Module] = []
    for rate in drop_path_rates:
        first = () if blocks else (stride, downsample)
        drop_path = DropPath(rate) if rate else None
        blocks.append(block(out_channels if blocks else in_channels, planes, *first, drop_path=drop_path, **block_args))
    return nn.Sequential(*blocks)


def _init_weights(module: nn.Module) -> None:
    # The authors' initialisation: He-normal by fan-out; all BatchNorm weights stay 1, the last of a block too.
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


def resnet_parts(
    block: type[BasicBlock] | type[Bottleneck],
    layers: tuple[int, int, int, int],
    num_classes: int,
    in_chans: int,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    reduce_dimension: bool = True,
    use_norm: bool = True,
    layer3_output_dim: int | None = None,
    layer4_output_dim: int | None = None,
    share_layer3: bool = False,
    cardinality: int = 1,
    base_width: int = 64,
) -> Parts:
    """Share the stem to layer2 (to layer3 with `share_layer3`), the rest per expert.

    layers: blocks in each of the four stages; cardinality, base_width: groups and width of ResNeXt;
    drop_path_rate: stochastic depth, growing from 0 at the first block to this at each expert's last, as in timm;
    reduce_dimension: layer3 and layer4 at 3/4 of their width (192 and 384 planes), also with one expert;
    layer3_output_dim, layer4_output_dim: planes of these stages, instead of the above;
    use_norm: cosine heads (scale 30) instead of linear ones. arXiv:2010.01809, section 3.
    """
    default = REDUCED_PLANES if reduce_dimension else FULL_PLANES
    planes = (*default[:2], layer3_output_dim or default[2], layer4_output_dim or default[3])
    block_args: dict[str, Any] = dict(cardinality=cardinality, base_width=base_width)
    channels = (64, *(p * block.expansion for p in planes))
    drop_paths = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)

    def stage(i: int) -> nn.Sequential:
        stride = 1 if i == 1 else 2
        where = (channels[i - 1], planes[i - 1], drop_paths[i - 1], stride)
        return residual_stage(block, *where, _conv_shortcut, **block_args)

    def stages(stem: dict[str, nn.Module], numbers: range) -> Stages:
        info = [dict(num_chs=64, reduction=2, module="act1")] if stem else []
        info += [dict(num_chs=channels[i], reduction=2 ** (i + 1), module=f"layer{i}") for i in numbers]
        made = Stages({**stem, **{f"layer{i}": stage(i) for i in numbers}}, info)
        _init_weights(made)
        return made

    stem = {
        "conv1": nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False),
        "bn1": nn.BatchNorm2d(64),
        "act1": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    }
    first_own = 4 if share_layer3 else 3

    def make_expert() -> Expert:
        return Expert(stages({}, range(first_own, 5)), channels[4], num_classes, use_norm, global_pool, drop_rate)

    return stages(stem, range(1, first_own)), make_expert


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Ride:
    return create_ride(resnet_parts, variant, pretrained, levels=(0, 1, 2, 3, 4), defaults=defaults, **kwargs)


_INAT = dict(num_classes=8142, mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))

default_cfgs = generate_default_cfgs(
    with_releases(
        {
            "ride_resnet10.imagenet_lt": ride_cfg(),
            "ride_resnet50.imagenet_lt": ride_cfg(),
            "ride_resnet50.inat18": ride_cfg(**_INAT),
            "ride_resnet50.inat18_distill_4experts": ride_cfg(**_INAT),
            "ride_resnet50.inat18_6experts": ride_cfg(**_INAT),
            "ride_resnet101.untrained": ride_cfg(),
            "ride_resnet152.untrained": ride_cfg(),
            "ride_resnext50.imagenet_lt": ride_cfg(),
            "ride_resnext50.imagenet_lt_distill_4experts": ride_cfg(),
            "ride_resnext50.imagenet_lt_6experts": ride_cfg(),
            "ride_resnext101.untrained": ride_cfg(),
            "ride_resnext152.untrained": ride_cfg(),
            "test_ride_resnet.untrained": ride_cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
        }
    )
)

_RESNEXT = dict(cardinality=32, base_width=4)


@register_model
def ride_resnet10(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNet-10, one basic block a stage: the authors' small ImageNet-LT network."""
    return _create("ride_resnet10", pretrained, dict(block=BasicBlock, layers=(1, 1, 1, 1)), kwargs)


@register_model
def ride_resnet50(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNet-50, stem to stage 2 shared, stages 3 and 4 per expert."""
    return _create("ride_resnet50", pretrained, dict(block=Bottleneck, layers=(3, 4, 6, 3)), kwargs)


@register_model
def ride_resnet101(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNet-101, stem to stage 2 shared, stages 3 and 4 per expert."""
    return _create("ride_resnet101", pretrained, dict(block=Bottleneck, layers=(3, 4, 23, 3)), kwargs)


@register_model
def ride_resnet152(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNet-152, stem to stage 2 shared, stages 3 and 4 per expert."""
    return _create("ride_resnet152", pretrained, dict(block=Bottleneck, layers=(3, 8, 36, 3)), kwargs)


@register_model
def ride_resnext50(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNeXt-50 32x4d, stem to stage 2 shared, stages 3 and 4 per expert."""
    return _create("ride_resnext50", pretrained, dict(block=Bottleneck, layers=(3, 4, 6, 3), **_RESNEXT), kwargs)


@register_model
def ride_resnext101(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNeXt-101 32x4d (none of the authors' networks), stages 3 and 4 per expert."""
    return _create("ride_resnext101", pretrained, dict(block=Bottleneck, layers=(3, 4, 23, 3), **_RESNEXT), kwargs)


@register_model
def ride_resnext152(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ResNeXt-152 32x4d, stem to stage 2 shared, stages 3 and 4 per expert."""
    return _create("ride_resnext152", pretrained, dict(block=Bottleneck, layers=(3, 8, 36, 3), **_RESNEXT), kwargs)


@register_model
def test_ride_resnet(pretrained: bool = False, **kwargs: Any) -> Ride:
    """A tiny ResNet for tests."""
    tiny = dict(block=BasicBlock, layers=(1, 1, 1, 1), layer3_output_dim=24, layer4_output_dim=32)
    return _create("test_ride_resnet", pretrained, tiny, kwargs)

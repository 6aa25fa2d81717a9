"""Residual blocks with fused norms; experts go through theirs in step, and one call does the norms of all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .norm import norm_relu


class FusedBlock(nn.Module):
    """A residual block of timm's ResNets: its modules under their names, its norms with shortcut and ReLU in one."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self.downsample = block.downsample
        self.num_convs = 3 if isinstance(block, Bottleneck) else 2
        self.training = block.training  # its modules keep their own modes

    def forward(self, x: Tensor) -> Tensor:
        return forward_blocks([[self]], [x])[0]

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class FusedStage(nn.Sequential):
    """Fused blocks one after the other, which a map goes through without leaving them."""

    def forward(self, x: Tensor) -> Tensor:
        return forward_blocks([self], [x])[0]


def _forward_rest(
    blocks: Sequence[FusedBlock], xs: Sequence[Tensor], shortcuts: Sequence[Tensor], twice: bool
) -> list[Tensor]:
    """What follows the first convolution of each block, from its output and the shortcut."""
    num_convs = blocks[0].num_convs
    for i in range(1, num_convs):
        xs = norm_relu([getattr(block, f"bn{i}") for block in blocks], xs)
        xs = [getattr(block, f"conv{i + 1}")(x) for block, x in zip(blocks, xs, strict=True)]
    return norm_relu([getattr(block, f"bn{num_convs}") for block in blocks], xs, shortcuts, twice)


def forward_blocks(
    stages: Sequence[Sequence[FusedBlock]],
    xs: Sequence[Tensor],
    enter: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None,
) -> list[Tensor]:
    """Maps [B, C, H, W] through one stage of blocks each, alike in shapes: in step, so that their norms go together.

    enter: (first blocks, xs) -> outputs of their first convolutions, and their shortcuts; by default block by block.
    """
    copies = list(xs) * 2
    for i, blocks in enumerate(zip(*stages, strict=True)):
        direct, beside = copies[: len(blocks)], copies[len(blocks) :]
        if i == 0 and enter is not None:
            firsts, shortcuts = enter(blocks, xs)
        else:
            firsts = [block.conv1(x) for block, x in zip(blocks, direct, strict=True)]
            shortcuts = [block.shortcut(x) for block, x in zip(blocks, beside, strict=True)]
        copies = _forward_rest(blocks, firsts, shortcuts, twice=i + 1 < len(stages[0]))
    return copies


def can_go_together(experts: Sequence[nn.Module]) -> bool:
    """Whether these are several experts that consist of fused stages and are alike."""
    stages = [expert.stages for expert in experts]
    if len(stages) < 2 or not all(isinstance(of_one, nn.Sequential) and len(of_one) for of_one in stages):
        return False
    if not all(isinstance(stage, FusedStage) for of_one in stages for stage in of_one):
        return False
    conv = stages[0][0][0].conv1
    if type(conv) is not nn.Conv2d or conv.groups > 1 or conv.bias is not None or conv.padding_mode != "zeros":
        return False
    # what modules say of themselves: shapes, strides, eps and momentum
    return len({tuple((type(module), module.extra_repr()) for module in of_one.modules()) for of_one in stages}) == 1


def _enter_together(blocks: Sequence[FusedBlock], xs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The first convolutions of all blocks, of a map that all `xs` are, as one with all filters; and their shortcuts.

    That map is the largest that experts see, and is read once, forward and backward; the same numbers as one by one,
    in another order of summation.
    """
    x, conv = xs[0], blocks[0].conv1
    filters = torch.cat([block.conv1.weight for block in blocks])
    maps = F.conv2d(x, filters, None, conv.stride, conv.padding, conv.dilation).chunk(len(blocks), 1)
    maps = [part.contiguous(memory_format=torch.channels_last) for part in maps]
    if blocks[0].downsample is None or blocks[0].downsample.state_dict():
        return maps, [block.shortcut(x) for block in blocks]
    return maps, [blocks[0].shortcut(x)] * len(blocks)


def forward_together(experts: Sequence[nn.Module], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The trunk's map [B, C, H, W] -> each expert's (features [B, D], logits [B, C]), all experts in step.

    An expert that the loss leaves out gets gradients of zero, where one by one it gets none.
    """
    enter, maps = _enter_together, [x] * len(experts)
    for stages in zip(*(expert.stages for expert in experts), strict=True):
        enter, maps = None, forward_blocks(stages, maps, enter)
    return [expert.forward_both_of(y) for expert, y in zip(experts, maps, strict=True)]


def _fusable(block: nn.Module) -> bool:
    """A plain block of timm's: BatchNorm, ReLU, and nothing between them."""
    if type(block) not in (BasicBlock, Bottleneck):
        return False
    extras = [block.se, block.drop_path, getattr(block, "drop_block", None), getattr(block, "aa", None)]
    norms = [module for name, module in block.named_children() if name.startswith("bn")]
    activations = [module for name, module in block.named_children() if name.startswith("act")]
    return (
        all(extra is None or type(extra) is nn.Identity for extra in extras)
        and all(type(activation) is nn.ReLU for activation in activations)
        and all(type(norm) is nn.BatchNorm2d for norm in norms)
        and all(norm.affine and norm.track_running_stats and norm.momentum is not None for norm in norms)
    )


def fuse_norm_relu(model: nn.Module) -> int:
    """Put a `FusedBlock` in the place of every plain ResNet block, in place; returns how many there were.

    A Sequential of nothing else becomes a `FusedStage`, which calls its blocks' parts and not the blocks; and experts
    in step are not called as modules in training either: hooks on them see nothing. Parameters, buffers, their names
    and what eval mode computes stay. Needs a C++ compiler when training.
    """
    blocks = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if _fusable(child)
    ]
    for parent, name, child in blocks:
        setattr(parent, name, FusedBlock(child))
    stages = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if type(child) is nn.Sequential and len(child) and all(isinstance(block, FusedBlock) for block in child)
    ]
    for parent, name, child in stages:
        stage = FusedStage(OrderedDict(child.named_children()))
        stage.training = child.training
        setattr(parent, name, stage)
    return len(blocks)

"""Residual blocks with fused norms, and experts that train batched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from ..experts import Experts
from ..ride import Ride
from .norm import norm_relu


class FusedBlock(nn.Module):
    """A residual block of timm whose norms are fused with shortcut and ReLU.

    Its modules keep their names.
    """

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self.downsample = block.downsample
        self.num_convs = 3 if isinstance(block, Bottleneck) else 2
        self.training = block.training  # not train(), which would reach its modules

    def forward(self, x: Tensor) -> Tensor:
        return forward_blocks([[self]], [x])[0]

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class FusedStage(nn.Sequential):
    """Fused blocks in sequence, run by one call of `forward_blocks`."""

    def forward(self, x: Tensor) -> Tensor:
        return forward_blocks([self], [x])[0]


def _forward_rest(
    blocks: Sequence[FusedBlock], xs: Sequence[Tensor], shortcuts: Sequence[Tensor], twice: bool
) -> list[Tensor]:
    """Run blocks from the outputs of their first convolutions to their own outputs."""
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
    """Run stages of equal shapes batched, each on its own feature map.

    Block by block, one call normalises for all stages.
    enter: (first blocks, xs) -> (outputs of their first convolutions, shortcuts), instead of one call per block.
    """
    copies = list(xs) * 2
    for i, blocks in enumerate(zip(*stages, strict=True)):
        xs, skips = copies[: len(blocks)], copies[len(blocks) :]
        if i == 0 and enter is not None:
            firsts, shortcuts = enter(blocks, xs)
        else:
            firsts = [block.conv1(x) for block, x in zip(blocks, xs, strict=True)]
            shortcuts = [block.shortcut(x) for block, x in zip(blocks, skips, strict=True)]
        copies = _forward_rest(blocks, firsts, shortcuts, twice=i + 1 < len(stages[0]))
    return copies


def _can_batch(experts: Sequence[nn.Module]) -> bool:
    """Check for several experts made of fused stages only, all with the same settings."""
    stages = [expert.stages for expert in experts]
    if len(stages) < 2 or not all(isinstance(of_one, nn.Sequential) and len(of_one) for of_one in stages):
        return False
    if not all(isinstance(stage, FusedStage) for of_one in stages for stage in of_one):
        return False
    conv = stages[0][0][0].conv1
    if type(conv) is not nn.Conv2d or conv.groups > 1 or conv.bias is not None or conv.padding_mode != "zeros":
        return False
    # extra_repr holds the settings of a module: shapes, strides, eps and momentum
    return len({tuple((type(module), module.extra_repr()) for module in of_one.modules()) for of_one in stages}) == 1


def _enter_batched(blocks: Sequence[FusedBlock], xs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Run the first convolutions of all blocks as one, on the feature map that all `xs` are.

    It is the largest that experts see, and is read once in each direction. The results differ from separate
    convolutions only by the order of summation.
    """
    x, conv = xs[0], blocks[0].conv1
    filters = torch.cat([block.conv1.weight for block in blocks])
    maps = F.conv2d(x, filters, None, conv.stride, conv.padding, conv.dilation).chunk(len(blocks), 1)
    maps = [part.contiguous(memory_format=torch.channels_last) for part in maps]
    if blocks[0].downsample is None or blocks[0].downsample.state_dict():
        return maps, [block.shortcut(x) for block in blocks]
    return maps, [blocks[0].shortcut(x)] * len(blocks)


class BatchedExperts(Experts):
    """Experts that train batched: every layer runs for all of them before the next.

    An expert left out of the loss gets zero gradients instead of None. Hooks on the experts' modules are not called in
    training. In eval mode, with gradient checkpointing, or if `use_experts` repeats one, experts run one by one.
    """

    def forward(self, x: Tensor, use_experts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        chosen = list(self) if use_experts is None else [self[i] for i in use_experts]
        stages = [expert.stages for expert in chosen]
        repeated = len(set(chosen)) < len(chosen)
        if not self.training or repeated or any(of_one.grad_checkpointing for of_one in stages):
            return super().forward(x, use_experts)
        maps: Sequence[Tensor] = [x] * len(chosen)
        for i, level in enumerate(zip(*stages, strict=True)):
            maps = forward_blocks(level, maps, None if i else _enter_batched)
        features = [expert.forward_pre_logits(y) for expert, y in zip(chosen, maps, strict=True)]
        logits = [expert.fc(y) for expert, y in zip(chosen, features, strict=True)]
        return torch.stack(features, 1), torch.stack(logits, 1)


def _fusable(block: nn.Module) -> bool:
    """Check for a plain block of timm: BatchNorm, ReLU and nothing between them."""
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


def fuse_blocks(model: nn.Module) -> int:
    """Replace every plain ResNet block by a `FusedBlock`; return how many.

    A Sequential of fused blocks only becomes a `FusedStage`; hooks on its blocks are not called.
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


def fuse(model: Ride) -> int:
    """Make ResNet blocks train faster on a CPU; return how many were replaced.

    BatchNorm, shortcut and ReLU become one pass over the activations, compiled at first use (needs a C++ compiler), and
    experts of equal shapes train batched. Parameters, buffers, their names and the results in eval mode stay.
    """
    num_blocks = fuse_blocks(model)
    if _can_batch(model.experts):
        batched = BatchedExperts(model.experts)
        batched.training = model.experts.training
        model.experts = batched
    return num_blocks

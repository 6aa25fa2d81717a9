"""BatchNorm, shortcut and ReLU in one pass over the activations, for training on a CPU.

On a CPU half of the time that a ResNet's step spends outside its convolutions goes into reading and writing the same
activations again, and channels that are no multiple of the vector width (RIDE's 24) make it worse. Here the pixels of
a channels-last map are seen as rows that hold a whole number of vectors, and torch.compile makes one loop of each pass:
statistics, normalisation with shortcut and ReLU, and the same two passes backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LANES = 32  # numbers a row is a multiple of: two vectors of 16 in float32, as many as one of bfloat16 is widened to
ROW_BLOCK = 32 * 1024  # numbers that are reduced together: they are read twice, and stay in the nearest cache


def _row_width(x: Tensor) -> int:
    return math.lcm(x.shape[1], LANES)


def _rows(x: Tensor) -> Tensor:
    """A channels-last map [B, C, H, W] as [P, R, K], pixels in memory order, K a common multiple of C and LANES."""
    width = _row_width(x)
    num_rows = x.numel() // width
    most = max(1, min(num_rows, ROW_BLOCK // width))
    block = next(r for r in range(most, 0, -1) if num_rows % r == 0)
    return x.permute(0, 2, 3, 1).reshape(-1, block, width)


def _like(rows: Tensor, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)


def _tile(by_channel: Tensor, rows: Tensor) -> Tensor:
    return by_channel.repeat(rows.shape[2] // len(by_channel))


def _statistics(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [P, R, K] -> mean, 1 / deviation [C], and what normalising multiplies by and adds [K].

    The running mean and var are updated in place. Blocks are centred on their own mean, so nothing cancels.
    """
    num_channels = len(weight)
    count = x.numel() // num_channels
    wide = x.float()
    block_mean = wide.mean(1)
    block_square = ((wide - block_mean[:, None]) ** 2).sum(1).view(-1, num_channels)
    block_mean = block_mean.view(-1, num_channels)
    batch_mean = block_mean.mean(0)
    square = block_square.sum(0) + x.shape[1] * ((block_mean - batch_mean) ** 2).sum(0)
    inverse = (square / count + eps).rsqrt()
    mean.lerp_(batch_mean.to(mean.dtype), momentum)
    var.lerp_((square / (count - 1)).to(var.dtype), momentum)
    scale = weight.float() * inverse
    return batch_mean, inverse, _tile(scale, x), _tile(bias.float() - batch_mean * scale, x)


def _normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x.float() * scale + shift).relu().to(x.dtype)


def _normalize_add(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor) -> Tensor:
    return (x.float() * scale + shift + shortcut.float()).relu().to(x.dtype)


def _where_passed(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient of a ReLU's input from that of its output; out: the output, or the input, positive where it is."""
    return torch.where(out <= 0, 0.0, grad.float())


def _factors(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight and bias [C], and the three factors [K] of the input's: a * grad + b * x + c."""
    num_channels = len(weight)
    count = x.numel() // num_channels
    of_bias = grad.sum(1).view(-1, num_channels).sum(0)
    with_input = (grad * x.float()).sum(1).view(-1, num_channels).sum(0)
    of_weight = inverse * (with_input - mean * of_bias)
    a = weight.float() * inverse
    b = -a * of_weight * inverse / count
    c = -a * of_bias / count - b * mean
    return of_weight.to(weight.dtype), of_bias.to(weight.dtype), _tile(a, x), _tile(b, x), _tile(c, x)


def _gradient_sums(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
    """`_factors` without a shortcut; norm: weight, mean and inverse."""
    return _factors(_where_passed(grad, x.float() * scale + shift), x, *norm)


def _gradient_sums_add(grad: Tensor, out: Tensor, x: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
    """`_factors`, and last the shortcut's gradient."""
    grad = _where_passed(grad, out)
    return *_factors(grad, x, *norm), grad.to(x.dtype)


def _gradient(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (_where_passed(grad, x.float() * scale + shift) * a + x.float() * b + c).to(x.dtype)


def _gradient_add(of_shortcut: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (of_shortcut.float() * a + x.float() * b + c).to(x.dtype)


@functools.cache
def _compiled(one_pass: Callable[..., Any]) -> Callable[..., Any]:
    """On its first call, one a shape: what torch.compile needs takes longer to import than all else here."""
    return torch.compile(one_pass, dynamic=False, fullgraph=True)


class _NormReLU(torch.autograd.Function):
    """relu(batch_norm(x) + shortcut) of channels-last maps [B, C, H, W], statistics of the batch."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, shortcut):
        rows = _rows(x)
        batch = (weight, bias, running_mean, running_var, momentum, eps)
        mean, inverse, scale, shift = _compiled(_statistics)(rows, *batch)
        if shortcut is None:  # where the ReLU passed is computed again: that is cheaper than to read it
            out, passed = _like(_compiled(_normalize)(rows, scale, shift), x), (scale, shift)
        else:
            out = _like(_compiled(_normalize_add)(rows, scale, shift, _rows(shortcut)), x)
            passed = (out,)
        ctx.save_for_backward(x, weight, mean, inverse, *passed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, inverse, *passed = ctx.saved_tensors
        grad, rows = _rows(grad.contiguous(memory_format=torch.channels_last)), _rows(x)
        if len(passed) == 1:  # the output, kept where there is a shortcut
            maps = (grad, _rows(passed[0]), rows)
            of_weight, of_bias, *factors, of_shortcut = _compiled(_gradient_sums_add)(*maps, weight, mean, inverse)
            of_x = _compiled(_gradient_add)(of_shortcut, rows, *factors)
            of_shortcut = _like(of_shortcut, x)
        else:
            maps = (grad, rows, *passed)
            of_weight, of_bias, *factors = _compiled(_gradient_sums)(*maps, weight, mean, inverse)
            of_x, of_shortcut = _compiled(_gradient)(*maps, *factors), None
        return _like(of_x, x), of_weight, of_bias, None, None, None, None, of_shortcut


def _fits(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the one-pass way computes the same: otherwise the plain modules do."""
    return (
        norm.training
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > x.shape[1]
        and x.numel() % _row_width(x) == 0
        and (shortcut is None or (shortcut.dtype == x.dtype and shortcut.shape == x.shape))
    )


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(x) + shortcut), x and shortcut [B, C, H, W]; in one pass in training on a CPU, else step by step.

    The sums are in float32. In bfloat16 the result is rounded once, where the steps round it twice.
    """
    if not _fits(norm, x, shortcut):
        x = norm(x)
        return F.relu(x if shortcut is None else x + shortcut)
    running = (norm.running_mean, norm.running_var)
    if norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
    else:  # a further ghost batch, which is not remembered
        running = tuple(statistic.clone() for statistic in running)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    state = (norm.weight, norm.bias, *running, norm.momentum, norm.eps)
    return _NormReLU.apply(x, *state, shortcut)


class FusedBlock(nn.Module):
    """A residual block of timm's ResNets: its modules under their names, its norms with shortcut and ReLU in one."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self.downsample = block.downsample
        self.num_convs = 3 if isinstance(block, Bottleneck) else 2
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_rest(self.conv1(x), x if self.downsample is None else self.downsample(x))

    def forward_rest(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """What follows the first convolution, from its output and the shortcut."""
        for i in range(1, self.num_convs):
            x = getattr(self, f"conv{i + 1}")(norm_relu(getattr(self, f"bn{i}"), x))
        return norm_relu(getattr(self, f"bn{self.num_convs}"), x, shortcut)


def _entry(expert: nn.Module) -> FusedBlock | None:
    """The first block of an expert, if it is a fused one."""
    first = next(iter(expert.stages.children()), None)
    block = first[0] if isinstance(first, nn.Sequential) and len(first) else None
    return block if isinstance(block, FusedBlock) else None


def can_enter_together(experts: Sequence[nn.Module]) -> bool:
    """Whether the experts' first convolutions are of one kind, beside shortcuts without parameters of their own."""
    blocks = [_entry(expert) for expert in experts]
    if any(block is None or block.downsample is None or list(block.downsample.parameters()) for block in blocks):
        return False
    convs = [block.conv1 for block in blocks]
    kinds = {(conv.weight.shape, conv.stride, conv.padding, conv.dilation) for conv in convs}
    return len(kinds) == 1 and all(conv.groups == 1 and conv.bias is None for conv in convs)


def forward_together(experts: Sequence[nn.Module], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The trunk's map [B, C, H, W] -> each expert's (features [B, D], logits [B, C]), their first convolutions as one.

    That map is the largest they see, and one convolution with all experts' filters reads it once, forward and
    backward; the same numbers as one by one, in another order of summation.
    """
    blocks = [_entry(expert) for expert in experts]
    conv, shortcut = blocks[0].conv1, blocks[0].downsample(x)
    filters = torch.cat([block.conv1.weight for block in blocks])
    maps = F.conv2d(x, filters, None, conv.stride, conv.padding, conv.dilation).chunk(len(blocks), 1)
    both = []
    for expert, block, first in zip(experts, blocks, maps, strict=True):
        y = block.forward_rest(first.contiguous(memory_format=torch.channels_last), shortcut)
        for stage, module in enumerate(expert.stages):
            y = module[1:](y) if stage == 0 else module(y)
        both.append(expert.forward_both_of(y))
    return both


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

    Parameters, buffers, their names and what eval mode computes stay as they are. Needs a C++ compiler when training.
    """
    blocks = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if _fusable(child)
    ]
    for parent, name, child in blocks:
        setattr(parent, name, FusedBlock(child))
    # Each shape is compiled for itself: the batch's and the last, smaller one's of every stage and image size.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 1024))
    return len(blocks)

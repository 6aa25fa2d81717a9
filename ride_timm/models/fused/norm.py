"""BatchNorm, shortcut and ReLU in one pass, for training on a CPU.

Outside its convolutions, a ResNet on a CPU mostly reads and writes activations, and channels that are no multiple of
the vector width (RIDE's 24) slow that down. Here the pixels of a channels-last feature map are viewed as rows of
complete vectors, and torch's compiler makes one loop of each pass: statistics, normalisation with shortcut and ReLU,
and two passes backward. Feature maps passed in one call share its overhead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LANES = 32  # rows are multiples of this: two vectors of 16 float32, or one of bfloat16 widened to them
ROW_BLOCK = 32 * 1024  # elements reduced in one block; the sums of the blocks are combined afterwards


def _row_width(x: Tensor) -> int:
    return math.lcm(x.shape[1], LANES)


def _rows(x: Tensor) -> Tensor:
    """View channels-last [B, C, H, W] as [P, R, K], pixels in memory order.

    K is the least common multiple of C and LANES, R rows make a block.
    """
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
    """Rows [P, R, K] -> mean [C], 1 / deviation [C], scale [K] and shift [K].

    Updates the running mean and var in place.
    A block sums differences to its first row, which loses little to cancellation; blocks are combined by their means.
    """
    num_channels = len(weight)
    count = x.numel() // num_channels
    wide = x.float()
    first = wide[:, 0]
    difference = wide - first[:, None]
    offset = difference.mean(1)
    block_square = ((difference * difference).mean(1) - offset * offset).clamp(min=0).view(-1, num_channels)
    block_mean = (first + offset).view(-1, num_channels)
    batch_mean = block_mean.mean(0)
    square = x.shape[1] * (block_square + (block_mean - batch_mean) ** 2).sum(0)
    inverse = (square / count + eps).rsqrt()
    mean.lerp_(batch_mean.to(mean.dtype), momentum)
    var.lerp_((square / (count - 1)).to(var.dtype), momentum)
    scale = weight.float() * inverse
    return batch_mean, inverse, _tile(scale, x), _tile(bias.float() - batch_mean * scale, x)


def _normalize(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor]:
    return ((x.float() * scale + shift).relu().to(x.dtype),)


def _normalize_add(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor) -> tuple[Tensor]:
    return ((x.float() * scale + shift + shortcut.float()).relu().to(x.dtype),)


def _where_passed(grad: Tensor, out: Tensor) -> Tensor:
    """Gradient of a ReLU's input; grad: of its output; out: its output or input."""
    return torch.where(out <= 0, 0.0, grad.float())


def _factors(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight and bias [C], and factors of the input's gradient.

    The factors a, b, c [K] give a * grad + b * x + c.
    """
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
    """Apply `_factors` without a shortcut; norm: weight, mean and inverse."""
    return _factors(_where_passed(grad, x.float() * scale + shift), x, *norm)


def _gradient_sums_add(
    out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, *grads: Tensor
) -> tuple[Tensor, ...]:
    """Apply `_factors` and append the shortcut's gradient.

    grads: of every copy of the output.
    """
    grad = _where_passed(sum(grad.float() for grad in grads), out)
    return *_factors(grad, x, weight, mean, inverse), grad.to(x.dtype)


def _gradient(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor]:
    return ((_where_passed(grad, x.float() * scale + shift) * a + x.float() * b + c).to(x.dtype),)


def _gradient_add(of_shortcut: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor]:
    return ((of_shortcut.float() * a + x.float() * b + c).to(x.dtype),)


_COMPILED: dict[tuple[Any, ...], Callable[..., Sequence[Tensor]]] = {}


def _each(
    one_pass: Callable[..., Any], maps: Sequence[tuple[Tensor, ...]], *constants: float
) -> list[tuple[Tensor, ...]]:
    """Call `one_pass(*tensors, *constants)` per feature map, compiled as one.

    maps: one tuple of contiguous tensors per feature map, of equal shapes and dtypes. The first call for these compiles
    for seconds. The cache is our own: the look-up of torch.compile costs more than a pass over a small feature map.
    """
    width, flat = len(maps[0]), [tensor for one in maps for tensor in one]
    like = tuple((tensor.shape, tensor.dtype) for tensor in maps[0])
    key = (one_pass, len(maps), constants, torch.get_num_threads(), like)
    if key not in _COMPILED:

        def of_each(*flat: Tensor) -> list[Tensor]:
            return [out for i in range(0, len(flat), width) for out in one_pass(*flat[i : i + width], *constants)]

        _COMPILED[key] = _compile(of_each, flat)
    outs = _COMPILED[key](*flat)
    num_outs = len(outs) // len(maps)
    return [tuple(outs[i : i + num_outs]) for i in range(0, len(outs), num_outs)]


def _compile(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile `function` for tensors of the shapes and dtypes of `inputs`."""
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        examples = [torch.empty_like(tensor) for tensor in inputs]  # a pass writes to its inputs
        return compile_graph(make_fx(function, tracing_mode="fake")(*examples), examples)


class _NormReLU(torch.autograd.Function):
    """relu(batch_norm(x) + shortcut) in training, of `count` feature maps.

    Feature maps: channels-last [B, C, H, W], of one shape.
    parts: x of all feature maps, then weight, bias, running mean, running var and the shortcuts, if any.
    twice: with shortcuts, the outputs are returned again as copies with gradients of their own.
    """

    @staticmethod
    def forward(ctx, count, twice, momentum, eps, *parts):
        xs, weights, biases, means, variances, *shortcuts = (parts[i : i + count] for i in range(0, len(parts), count))
        rows = [_rows(x) for x in xs]
        norms = list(zip(rows, weights, biases, means, variances, strict=True))
        statistics = _each(_statistics, norms, momentum, eps)
        factors = [(x, *of_one[2:]) for x, of_one in zip(rows, statistics, strict=True)]
        if shortcuts:
            added = [(*of_one, _rows(shortcut)) for of_one, shortcut in zip(factors, shortcuts[0], strict=True)]
            outs = _each(_normalize_add, added)
        else:
            outs = _each(_normalize, factors)
        outs = [_like(out, x) for (out,), x in zip(outs, xs, strict=True)]
        kept = list(zip(*statistics, strict=True))
        if shortcuts:  # without, the mask of the ReLU is recomputed, which is cheaper than reading it
            kept = [outs, *kept[:2]]
        ctx.count, ctx.has_shortcuts = count, bool(shortcuts)
        ctx.save_for_backward(*xs, *weights, *(tensor for of_all in kept for tensor in of_all))
        return (*outs, *(out.view_as(out) for out in outs)) if twice else tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        count, saved = ctx.count, ctx.saved_tensors
        xs, *kept = (saved[i : i + count] for i in range(0, len(saved), count))
        rows = [_rows(x) for x in xs]
        grads = [_rows(grad.contiguous(memory_format=torch.channels_last)) for grad in grads]
        of_shortcuts = ()
        if ctx.has_shortcuts:
            weights, outs, means, inverses = kept
            copies = (grads[i : i + count] for i in range(0, len(grads), count))
            maps = zip([_rows(out) for out in outs], rows, weights, means, inverses, *copies, strict=True)
            sums = _each(_gradient_sums_add, list(maps))
            of_xs = _each(_gradient_add, [(one[5], x, *one[2:5]) for one, x in zip(sums, rows, strict=True)])
            of_shortcuts = [_like(one[5], x) for one, x in zip(sums, xs, strict=True)]
        else:
            weights, means, inverses, scales, shifts = kept
            maps = list(zip(grads, rows, scales, shifts, strict=True))
            norms = zip(weights, means, inverses, strict=True)
            sums = _each(_gradient_sums, [(*one, *norm) for one, norm in zip(maps, norms, strict=True)])
            of_xs = _each(_gradient, [(*one, *factors[2:]) for one, factors in zip(maps, sums, strict=True)])
        of_xs = [_like(of_x, x) for (of_x,), x in zip(of_xs, xs, strict=True)]
        of_norms = [one[i] for i in (0, 1) for one in sums]
        return None, None, None, None, *of_xs, *of_norms, *[None] * (2 * count), *of_shortcuts


def _fits(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> bool:
    """Check that the fused pass computes what the modules do."""
    return (
        norm.training
        and norm.momentum is not None  # None: a cumulative average
        and not torch.compiler.is_compiling()  # which fuses this as well
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > x.shape[1]
        and x.numel() % _row_width(x) == 0
        and (shortcut is None or (shortcut.dtype == x.dtype and shortcut.shape == x.shape))
    )


def _alike(norms: Sequence[nn.BatchNorm2d], xs: Sequence[Tensor]) -> bool:
    """Check that one compiled function serves all feature maps."""
    kinds = {
        (
            x.shape,
            x.dtype,
            norm.weight.dtype,
            norm.running_mean.dtype,
            norm.momentum,
            norm.eps,
            norm.track_running_stats,
        )
        for norm, x in zip(norms, xs, strict=True)
    }
    return len(kinds) == 1


def norm_relu(
    norms: Sequence[nn.BatchNorm2d],
    xs: Sequence[Tensor],
    shortcuts: Sequence[Tensor] | None = None,
    twice: bool = False,
) -> list[Tensor]:
    """relu(norm(x) + shortcut) of each feature map [B, C, H, W].

    twice: return every output twice, first all once.
    In training on a CPU all feature maps take one pass, if they fit (`_fits`) and are alike with their norms. Two uses
    of an output should take a copy each: the backward pass then sums their gradients (with shortcuts; without, the
    copies are the same tensor). Otherwise the modules run one after the other.
    Sums are in float32; bfloat16 results are rounded once, where the modules round twice.
    """
    added = [None] * len(xs) if shortcuts is None else shortcuts
    fits = all(_fits(norm, x, shortcut) for norm, x, shortcut in zip(norms, xs, added, strict=True))
    if not (fits and _alike(norms, xs)):
        outs = [norm(x) for norm, x in zip(norms, xs, strict=True)]
        outs = [F.relu(x if shortcut is None else x + shortcut) for x, shortcut in zip(outs, added, strict=True)]
        return outs * 2 if twice else outs
    means, variances = [norm.running_mean for norm in norms], [norm.running_var for norm in norms]
    if norms[0].track_running_stats:
        for norm in norms:
            norm.num_batches_tracked.add_(1)
    else:  # ghost batches after the first leave the running statistics alone
        means, variances = ([statistic.clone() for statistic in statistics] for statistics in (means, variances))
    parts = [*xs, *(norm.weight for norm in norms), *(norm.bias for norm in norms), *means, *variances]
    state = (norms[0].momentum, norms[0].eps)
    if shortcuts is None:
        return list(_NormReLU.apply(len(xs), False, *state, *parts)) * (1 + twice)
    parts += [shortcut.contiguous(memory_format=torch.channels_last) for shortcut in shortcuts]
    return list(_NormReLU.apply(len(xs), twice, *state, *parts))

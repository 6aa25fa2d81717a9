"""MACs of trunk, experts and gates, counted by thop, and their mean under routing."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from ..models import CosineClassifier, Ride, Router


@dataclass(frozen=True)
class Macs:
    """MACs per image of trunk, experts with heads, and gates; and the parameters."""

    trunk: float
    experts: tuple[float, ...]
    gates: tuple[float, ...]
    params: int

    @property
    def ensemble(self) -> float:
        """MACs of the trunk and all experts."""
        return self.trunk + sum(self.experts)

    def expected(self, experts_used: Sequence[float]) -> float:
        """Mean MACs under routing, gates included.

        experts_used: fractions of images that use 1, 2, … experts.
        """
        if len(experts_used) != len(self.experts):
            raise InputError(f"{len(experts_used)} fractions for {len(self.experts)} experts: expected one for each.")
        if not (min(experts_used) >= 0 and abs(sum(experts_used) - 1) <= 1e-3):  # nor NaN
            raise InputError(f"experts_used {tuple(experts_used)}: expected fractions that sum to 1.")
        reached = [sum(experts_used[i:]) for i in range(len(experts_used))]
        own = sum(fraction * macs for fraction, macs in zip(reached, self.experts, strict=True))
        return self.trunk + own + sum(fraction * macs for fraction, macs in zip(reached, self.gates, strict=False))


def _count_cosine(module: CosineClassifier, inputs: tuple[Tensor], output: Tensor) -> None:
    # as a linear layer without bias; the normalisation is negligible
    module.total_ops += torch.DoubleTensor([inputs[0].shape[0] * module.in_features * module.out_features])


def _count_pooling(module: nn.AdaptiveAvgPool2d, inputs: tuple[Tensor], output: Tensor) -> None:
    # thop's rule for AvgPool2d, one operation per output; its rule for the adaptive kind counts the additions, too
    module.total_ops += torch.DoubleTensor([output.numel()])


_RULES = {CosineClassifier: _count_cosine, nn.AdaptiveAvgPool2d: _count_pooling}


class _Profile(TorchFunctionMode):
    """thop with the layers it misses.

    It has rules for exact types, and hooks calls of layers only.
    Subclasses of convolutions and linear layers get the rule of their base. Linear layers whose weight a network
    passes to `F.linear` (attention that reads `qkv.weight`) are counted there.
    """

    def __init__(self, module: nn.Module) -> None:
        from thop.profile import register_hooks

        super().__init__()
        self.by_hand: dict[int, int] = {}
        self.module = module
        self.rules: dict[type, Any] = dict(_RULES)
        self.weights = set()
        for part in module.modules():
            if isinstance(part, nn.Linear):
                self.weights.add(id(part.weight))
                self.rules.setdefault(type(part), self._count_linear)
            elif isinstance(part, nn.Conv2d):
                self.rules.setdefault(type(part), register_hooks[nn.Conv2d])

    def _count_linear(self, module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        module.total_ops += torch.DoubleTensor([output.numel() * module.in_features])
        self.by_hand.pop(id(module.weight), None)  # F.linear within the layer's own forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if id(weight) in self.weights:
                self.by_hand[id(weight)] = self.by_hand.get(id(weight), 0) + output.numel() * weight.shape[1]
        return output

    def count(self, *inputs: Tensor) -> tuple[float, Any]:
        """Multiply-accumulates of the module on these inputs, and its outputs."""
        from thop import profile

        outputs = []
        self.module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        with self:
            counted = profile(self.module, inputs, custom_ops=self.rules, verbose=False)[0]
        return float(counted) + sum(self.by_hand.values()), outputs[0]


class _Gate(nn.Module):
    """One gate as a module, for thop."""

    def __init__(self, router: Router, i: int) -> None:
        super().__init__()
        self.router, self.i = router, i

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        return self.router.gate(self.i, features, logits)


@torch.no_grad()
def count_macs(model: Ride, input_size: tuple[int, int, int]) -> Macs:
    """Count on one zero image of size (channels, height, width), on a copy."""
    copy = deepcopy(model).float().eval()
    device = next(copy.parameters()).device
    if device.type != "meta":  # meta tensors have shapes, which suffice
        device = torch.device("cpu")
        copy = copy.to(device, memory_format=torch.contiguous_format)
    image = torch.zeros(1, *input_size, device=device)
    trunk, shared = _Profile(copy.trunk).count(image)
    experts, gates = [], []
    for i, expert in enumerate(copy.experts):
        own, (features, logits) = _Profile(expert).count(shared)
        experts.append(own)
        if copy.router is not None and i + 1 < copy.num_experts:
            gates.append(_Profile(_Gate(copy.router, i)).count(features, logits)[0])
    params = sum(parameter.numel() for parameter in model.parameters())
    return Macs(trunk, tuple(experts), tuple(gates), params)

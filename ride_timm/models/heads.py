"""Classifiers of an expert: linear, cosine, and with an affine per class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from ..errors import InputError

COSINE_SCALE = 30.0  # of the logits, as the authors have it


class CosineClassifier(nn.Linear):
    """Scaled cosine similarity with a weight per class: the head of LDAM and RIDE.

    logits = scale · <x / |x|, w_c / |w_c|>: x [B, D] -> [B, C]. weight [C, D] starts uniform in (-1, 1), scaled to rows
    of unit norm. arXiv:1906.07413, section 3. transformers initialises it as a linear layer.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = COSINE_SCALE) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(F.normalize(self.weight.uniform_(-1, 1), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"


class ClassAffine(nn.Module):
    """A classifier with a scale and an offset per class, initially without effect.

    logits = weight · head(x) + bias: x [B, D] -> [B, C]. A cosine head cannot absorb such a
    scale, since it normalises its own weights.
    """

    def __init__(self, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        like = next(head.parameters())
        self.head = head
        # a norm for its parameters alone: when the classes change, timm drops them and transformers initialises them
        self.affine = nn.LayerNorm(num_classes, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.affine.weight * self.head(x) + self.affine.bias


def linear_layer(head: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer of a linear or cosine classifier, with a weight vector per class; InputError for any other."""
    layer = head.head if isinstance(head, ClassAffine) else head
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise InputError(f"a {type(layer).__name__} has no weight vector per class: pass --use-norm for a cosine head.")
    return layer


def create_head(num_features: int, num_classes: int, use_norm: bool) -> nn.Module:
    """Create a cosine head (`use_norm`) or a linear head; identity for no classes."""
    if num_classes <= 0:
        return nn.Identity()
    return CosineClassifier(num_features, num_classes) if use_norm else nn.Linear(num_features, num_classes)


def create_pool(global_pool: str, num_classes: int) -> SelectAdaptivePool2d:
    """Create timm's pooling of that name; '' disables it.

    Raises ValueError for '' with classes: a classifier needs pooled features.
    """
    if not global_pool and num_classes > 0:
        raise ValueError(f"global_pool='' with num_classes={num_classes}: only num_classes=0 works without pooling.")
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))

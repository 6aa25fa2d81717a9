"""A scale and an offset for each class behind a classifier, which re-balance or align trained heads as they are."""

from __future__ import annotations

import torch
from timm.models._input import update_model_args
from torch import Tensor, nn

from .ride import Ride


class ClassAffine(nn.Module):
    """A classifier whose logits are scaled and shifted class by class: weight * head(x) + bias, at first head(x).

    head: linear or cosine, features [B, D] -> logits [B, C]. A cosine head cannot hold such a scale in its own weights,
    since it divides their norms out.
    """

    def __init__(self, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        place = next(head.parameters())
        self.head = head
        self.affine = nn.Module()  # named like a layer, so that timm finds weight and bias to drop for other classes
        self.affine.weight = nn.Parameter(torch.ones(num_classes, device=place.device, dtype=place.dtype))
        self.affine.bias = nn.Parameter(torch.zeros(num_classes, device=place.device, dtype=place.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.affine.weight * self.head(x) + self.affine.bias


def add_class_affine(model: Ride) -> None:
    """Give every expert's classifier a scale and an offset a class; where it has them, they stay as they are."""
    for expert in model.experts:
        if not isinstance(expert.fc, ClassAffine) and model.num_classes > 0:
            expert.fc = ClassAffine(expert.fc, model.num_classes).train(expert.training)
            update_model_args(model, class_affine=True)


def has_class_affine(model: Ride) -> bool:
    """Whether the classifiers have a scale and an offset a class."""
    return isinstance(model.experts[0].fc, ClassAffine)

"""Classifiers that start from the class means of pretrained features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..hardware import double
from ..models import CosineClassifier, Ride
from ..models.heads import COSINE_SCALE, linear_layer
from ..progress import progress_bar

NOISE = 0.5  # length of the random vector added to a unit mean, for every expert but the first


@torch.no_grad()
def heads_from_class_means(
    model: Ride, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator, seed: int
) -> None:
    """Set each expert's classifier to the normalised mean feature of each class.

    batches: this process' (images, labels) of the training set, under the test transform. A cosine head then starts as
    a nearest-mean classifier; a linear one as well, with rows scaled so that its logits have the size of a cosine
    head's. Copies of one backbone would stay equal under a loss that treats them alike, so each expert but the first
    adds a random vector, drawn from `seed`, to every mean. Raises `InputError` for another kind of classifier. Shi et
    al. 2024 (LIFT), arXiv:2309.10019, section 4.
    """
    means, norm = class_means(model, batches, accelerator)
    generator = torch.Generator().manual_seed(seed)
    for i, (expert, mean) in enumerate(zip(model.experts, F.normalize(means, dim=-1), strict=True)):
        if i > 0:
            noise = F.normalize(torch.randn(mean.shape, generator=generator), dim=-1)
            mean = F.normalize(mean + NOISE * noise.to(mean), dim=-1)
        head = linear_layer(expert.fc)
        if not isinstance(head, CosineClassifier):
            mean = mean * COSINE_SCALE / norm
            if head.bias is not None:
                head.bias.zero_()
        head.weight.copy_(mean.view_as(head.weight))


@torch.no_grad()
def class_means(model: Ride, batches: Iterable[Any], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Mean pooled feature of each class by expert [E, C, D], over all processes; and the mean norm of a feature."""
    training = model.training
    model.eval()
    C = model.num_classes
    sums = counts = norms = None
    for images, labels in progress_bar(batches, desc="class means", disable=not accelerator.is_main_process):
        with accelerator.autocast():
            features = double(model.forward_experts(images.to(accelerator.device))[0])  # [B, E, D]
        labels = labels.to(features.device)
        if sums is None or counts is None or norms is None:
            sums = features.new_zeros(C, *features.shape[1:])
            counts, norms = features.new_zeros(C), features.new_zeros(1)
        sums.index_add_(0, labels, features)
        counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
        norms += features.norm(dim=-1).mean(1).sum()
    model.train(training)
    sums, counts, norms = (accelerator.reduce(value, "sum") for value in (sums, counts, norms))
    means = sums / counts.clamp(min=1)[:, None, None]
    dtype = next(model.parameters()).dtype
    return means.transpose(0, 1).to(dtype), (norms / counts.sum()).to(dtype)

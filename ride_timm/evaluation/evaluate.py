"""Evaluate a model on a test set: in training, by command and for releases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import Ride
from .counts import CountAccumulator
from .macs import count_macs
from .metrics import compute_metrics

# images -> (logits [B, C], or [B, E, C] per expert; number of experts used [B] if routed, else None)
Predict = Callable[[Tensor], tuple[Tensor, Tensor | None]]
# batches of (logits, number of experts used, targets), as `Predict` returns them
Predictions = Iterable[tuple[Tensor, Tensor | None, Tensor]]


def evaluation_batch(input_size: int) -> int:
    """Batch size of every evaluation: the last digits of logits depend on it."""
    return 500 if input_size <= 64 else 128


def predictor(
    model: Ride, routed: bool = False, threshold: float = 0.5, experts: Sequence[int] | None = None
) -> Predict:
    """The prediction function of a model: ensemble, routed, or per expert.

    experts: indices of those whose logits are returned one by one.
    """
    if routed:
        return lambda images: model.forward_routed(images, threshold)
    if experts is not None:
        return lambda images: (model.forward_experts(images, experts)[1], None)
    return lambda images: (model.forward_head(model.forward_features(images)), None)


@torch.inference_mode()
def evaluate(
    model: Ride,
    batches: Iterable[tuple[Tensor, Tensor]],
    class_counts: Sequence[int],
    routed: bool = False,
    threshold: float = 0.5,
    shots: tuple[int, int] = (100, 20),
) -> dict[str, Any]:
    """The metrics of `compute_metrics`, over the samples of all processes.

    batches: images [b, 3, H, W] and targets [b] of this process; class_counts [C]: training images of each class;
    shots: see `priors.shot_groups`.
    """
    num_used, num_members = (model.num_experts, None) if routed else (None, model.num_experts)
    predict = predictor(model, routed, threshold, None if routed else range(model.num_experts))
    counts = CountAccumulator(model.num_classes, num_used, num_members, next(model.parameters()).device)
    was_training = model.training
    model.eval()
    predictions = ((*predict(images), targets) for images, targets in batches)
    metrics = metrics_of(predictions, counts, class_counts, shots)
    model.train(was_training)
    return metrics


@torch.inference_mode()
def metrics_of(
    predictions: Predictions, counts: CountAccumulator, class_counts: Sequence[int], shots: tuple[int, int] = (100, 20)
) -> dict[str, Any]:
    """The metrics of `compute_metrics` of predictions, which may be a generator, counted by a new accumulator."""
    for logits, used, targets in predictions:
        members = logits if counts.num_members is not None else None
        counts.update(logits if members is None else members.mean(1), targets, used, members)
    return compute_metrics(counts.reduce(), class_counts, shots)


@torch.inference_mode()
def collect(predict: Predict, batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """All predictions of a test set on the CPU, for metrics that depend on all of them."""
    predictions = ((*predict(images), targets) for images, targets in batches)
    return [
        (logits.cpu(), None if used is None else used.cpu(), targets.cpu()) for logits, used, targets in predictions
    ]


def with_macs(metrics: dict[str, Any], model: Ride, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """The metrics with `macs` per image, their mean if the metrics are of a router."""
    macs = count_macs(model, input_size)
    used = metrics.get("experts_used")
    return metrics | {"macs": round(macs.expected(used) if used else macs.ensemble)}

"""A model on a test set: one function for the training script and for the command line, so that numbers agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .flops import count_macs
from .metrics import Accuracy
from .models import Ride

Answer = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # images -> (logits [B, C], experts used [B] if routed)


def evaluation_batch(input_size: int) -> int:
    """Images a forward pass: the same wherever a model is evaluated, since the last digits follow the shapes."""
    return 500 if input_size <= 64 else 128


def answer_of(model: Ride, routed: bool = False, threshold: float = 0.5) -> Answer:
    """How a model answers: as the whole ensemble, or routed."""
    if routed:
        return lambda images: model.forward_routed(images, threshold)
    return lambda images: (model.forward_head(model.forward_features(images)), None)


@torch.inference_mode()
def evaluate(
    model: Ride,
    batches: Iterable[tuple[Tensor, Tensor]],
    class_counts: Sequence[int],
    routed: bool = False,
    threshold: float = 0.5,
    answer: Answer | None = None,
) -> dict[str, Any]:
    """Accuracy in percent by shot group, over all processes; routed: also the share of samples by experts used.

    batches: this process' (images [b, 3, H, W], targets [b]); class_counts [C]: training images of every class;
    answer: another way to the model's answers, such as a faster one of `inference`, routed or not as said.
    """
    device = next(model.parameters()).device
    accuracy = Accuracy(model.num_classes, model.num_experts if routed else None, device)
    answer = answer or answer_of(model, routed, threshold)
    was_training = model.training
    model.eval()
    for images, targets in batches:
        logits, used = answer(images)
        accuracy.update(logits, targets, used)
    model.train(was_training)
    return accuracy.reduce().compute(class_counts)


def with_macs(metrics: dict[str, Any], model: Ride, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """The metrics with `macs` per image: of the ensemble, or the expectation under the routing they measured."""
    macs = count_macs(model, input_size)
    used = metrics.get("experts_used")
    return metrics | {"macs": round(macs.expected(used) if used else macs.ensemble)}

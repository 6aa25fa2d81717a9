"""A model on a test set: one function for the training script and for the command line, so that numbers agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import Ride
from .counts import Accuracy
from .macs import count_macs

# images -> (logits [B, C], or [B, E, C] by expert; experts used [B] if routed)
Answer = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def evaluation_batch(input_size: int) -> int:
    """Images a forward pass: the same wherever a model is evaluated, since the last digits follow the shapes."""
    return 500 if input_size <= 64 else 128


def answer_of(
    model: Ride, routed: bool = False, threshold: float = 0.5, experts: Sequence[int] | None = None
) -> Answer:
    """How a model answers: as the whole ensemble, routed, or with the logits of these experts one by one."""
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
    answer: Answer | None = None,
    members: int | None = None,
    shots: tuple[int, int] = (100, 20),
) -> dict[str, Any]:
    """All figures of `measures.figures`, over all processes.

    batches: this process' (images [b, 3, H, W], targets [b]); class_counts [C]: training images of every class;
    answer: another way to the model's answers, such as a faster one of `inference`, routed or not as said, and
    members: of how many experts it gives the logits one by one, if it does; shots: see `priors.shot_groups`.
    """
    device = next(model.parameters()).device
    if answer is None:
        members = None if routed else model.num_experts
        answer = answer_of(model, routed, threshold, None if routed else range(model.num_experts))
    accuracy = Accuracy(model.num_classes, model.num_experts if routed else None, device, members)
    was_training = model.training
    model.eval()
    for images, targets in batches:
        logits, used = answer(images)
        by_expert = logits if members is not None else None
        accuracy.update(logits if by_expert is None else by_expert.mean(1), targets, used, by_expert)
    model.train(was_training)
    return accuracy.reduce().compute(class_counts, shots)


def with_macs(metrics: dict[str, Any], model: Ride, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """The metrics with `macs` per image: of the ensemble, or the expectation under the routing they measured."""
    macs = count_macs(model, input_size)
    used = metrics.get("experts_used")
    return metrics | {"macs": round(macs.expected(used) if used else macs.ensemble)}

"""Metrics of a model on its test set, by the same code as training and `python -m ride_timm evaluate`."""

from __future__ import annotations

from typing import Any

import torch

from ride_timm import InputError
from ride_timm.data.load import load_longtail
from ride_timm.data.loaders import make_loader
from ride_timm.evaluation.evaluate import evaluate, evaluation_batch, with_macs
from ride_timm.evaluation.macs import count_macs
from ride_timm.evaluation.routing_curve import collect_outcomes, prefix_points, routing_curve, thin
from ride_timm.models import Ride
from ride_timm.training.recipe import Recipe


def measure(model: Ride, recipe: Recipe, *, curve: bool = True) -> dict[str, Any]:
    """Measure the metrics of results.json on the recipe's test set.

    {"class_counts", "class_names", "stages": {"experts": …, "router": …}, "routing": {"curve", "prefixes"}}, the last
    two for models with a router only; of re-balanced heads, "heads" in place of "experts". curve: False leaves
    "routing" out, which takes a pass over the data of its own.
    InputError if the data have another number of classes.
    """
    data = load_longtail(**recipe.data_args)
    if data.num_classes != model.num_classes:
        raise InputError(f"the data set {data.name} has {data.num_classes} classes, the model {model.num_classes}.")
    model = model.eval().to(memory_format=torch.channels_last)  # as in training
    size = recipe.policy.input_size(recipe.input_size)
    shape = (model.in_chans, size, size)
    batches = make_loader(
        data.test,
        recipe.policy,
        train=False,
        batch_size=evaluation_batch(size),
        seed=0,
        input_size=size,
        num_workers=recipe.workers,
        reduced_decode=recipe.reduced_decode,
    )
    counts, shots = data.class_counts, recipe.shots
    stages = {recipe.ensemble_stage: with_macs(evaluate(model, batches, counts, shots=shots), model, shape)}
    found: dict[str, Any] = dict(class_counts=counts, class_names=list(data.class_names), stages=stages)
    if model.router is not None:
        routed = evaluate(model, batches, counts, routed=True, threshold=recipe.threshold, shots=shots)
        stages["router"] = with_macs(routed, model, shape) | dict(threshold=recipe.threshold)
    if model.router is not None and curve:
        outcomes, macs = collect_outcomes(model, batches), count_macs(model, shape)
        points = thin(routing_curve(outcomes, macs, counts, shots=shots), 60)
        found["routing"] = dict(curve=points, prefixes=prefix_points(outcomes, macs, counts, shots))
    return found

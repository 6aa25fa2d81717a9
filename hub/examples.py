"""Example images of a release: three of its test set or drawings of its classes, for the widget of its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from folder import EXAMPLES
from PIL.Image import Image

from ride_timm.data.load import load_longtail
from ride_timm.inference.demo.drawings import DRAWINGS
from ride_timm.models import Ride
from ride_timm.training.recipe import Recipe

_MOST = 3  # classes listed of a prediction
_TRIED = 50  # images of a class


@torch.inference_mode()
def write_examples(model: Ride, recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Write a test image of the most frequent, the middle and the rarest class, and predict it.

    Each is the first that is predicted right, where one is. Returns [{"file", "class", "train_images",
    "output": [{"label", "score"}, …]}], likeliest first, as the lines of the card predict. The images are public with
    the release, so the data set must allow that.
    """
    data = load_longtail(**recipe.data_args)
    transform = _transform(model)
    order = np.argsort(-np.asarray(data.class_counts), kind="stable")
    examples = []
    for file, label in zip(EXAMPLES, (order[0], order[len(order) // 2], order[-1]), strict=True):
        images = [data.test[i][0] for i in np.flatnonzero(data.test.labels == label)[:_TRIED]]
        predictions = model(torch.stack([transform(image.convert("RGB")) for image in images])).softmax(-1)
        first = int((predictions.argmax(1) == int(label)).int().argmax())
        images[first].save(folder / file)
        facts = {"class": data.class_names[label], "train_images": data.class_counts[label]}
        examples.append(dict(file=file, **facts, output=_likeliest(predictions[first], data.class_names)))
    return examples


@torch.inference_mode()
def draw_examples(model: Ride, names: list[str], class_counts: list[int], folder: Path) -> list[dict[str, Any]]:
    """Write drawings of up to three classes, from frequent to rare, and predict them; returns as `write_examples`.

    For data whose own images may not be published. Drawings that are predicted wrong are left out.
    """
    transform, found = _transform(model), []
    for label in sorted(range(len(names)), key=lambda c: -class_counts[c]):
        if names[label] in DRAWINGS and model.in_chans == 3:
            image = DRAWINGS[names[label]]()
            scores = model(transform(image)[None]).softmax(-1)[0]
            if int(scores.argmax()) == label:
                found.append((image, label, _likeliest(scores, names)))
    spread = found if len(found) <= len(EXAMPLES) else [found[0], found[len(found) // 2], found[-1]]
    examples = []
    for file, (image, label, output) in zip(EXAMPLES, spread, strict=False):
        image.save(folder / file)
        facts = {"class": names[label], "train_images": class_counts[label], "drawn": True}
        examples.append(dict(file=file, **facts, output=output))
    return examples


def _transform(model: Ride) -> Callable[[Image], torch.Tensor]:
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


def _likeliest(predictions: torch.Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Labels and scores of a widget, likeliest first; predictions: [C]."""
    scores = [round(score, 3) for score in predictions.tolist()]
    best = sorted(range(len(scores)), key=lambda c: -scores[c])[:_MOST]
    return [dict(label=names[c], score=scores[c]) for c in best if scores[c]]

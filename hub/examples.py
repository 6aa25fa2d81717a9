"""Example images of a release: three of its test set, for the widget of its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from folder import EXAMPLES

from ride_timm.data.load import load_longtail
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
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    order = np.argsort(-np.asarray(data.class_counts), kind="stable")
    examples = []
    for file, label in zip(EXAMPLES, (order[0], order[len(order) // 2], order[-1]), strict=True):
        images = [data.test[i][0] for i in np.flatnonzero(data.test.labels == label)[:_TRIED]]
        predictions = model(torch.stack([transform(image.convert("RGB")) for image in images])).softmax(-1)
        first = int((predictions.argmax(1) == int(label)).int().argmax())
        images[first].save(folder / file)
        scores = [round(score, 3) for score in predictions[first].tolist()]
        best = sorted(range(len(scores)), key=lambda c: -scores[c])[:_MOST]
        output = [dict(label=data.class_names[c], score=scores[c]) for c in best if scores[c]]
        facts = {"class": data.class_names[label], "train_images": data.class_counts[label]}
        examples.append(dict(file=file, **facts, output=output))
    return examples

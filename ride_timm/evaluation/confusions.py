"""Confusions: which classes are taken for which others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_csv
from .counts import Counts

NUM_LARGEST, NUM_EXAMPLES = 10, 4


def confusion_matrix(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Images by class and predicted class: targets [N], predictions [N] -> int64 [C, C]."""
    cells = np.bincount(targets * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def largest_confusions(counts: Counts, most: int = NUM_LARGEST) -> list[dict[str, Any]]:
    """The pairs of a class and another one predicted for most of its images, the largest first.

    -> for each pair: "true" and "predicted" class; "images", their number, and "percent" of the class' test images;
    "examples", the four most confident of them: "image", its position in the test set, and "probability".
    """
    num_classes = len(counts.images)
    wrong = np.flatnonzero(counts.targets != counts.predictions)
    pairs = counts.targets[wrong] * num_classes + counts.predictions[wrong]
    kinds, sizes = np.unique(pairs, return_counts=True)
    confusions = []
    for k in np.argsort(-sizes, kind="stable")[:most].tolist():
        true, predicted = divmod(int(kinds[k]), num_classes)
        images = wrong[pairs == kinds[k]]
        examples = images[np.argsort(-counts.probabilities[images], kind="stable")[:NUM_EXAMPLES]]
        confusions.append(
            dict(
                true=true,
                predicted=predicted,
                images=len(images),
                percent=100 * len(images) / int(counts.images[true]),
                examples=[dict(image=int(i), probability=round(float(counts.probabilities[i]), 6)) for i in examples],
            )
        )
    return confusions


def write_confusion_matrix(path: Path, matrix: np.ndarray, class_names: Sequence[str]) -> None:
    """Write a matrix [C, C] as CSV: a row for each class, a column for each predicted class."""
    rows = ([name, *row] for name, row in zip(class_names, matrix.tolist(), strict=True))
    write_csv(path, ["true \\ predicted", *class_names], rows)

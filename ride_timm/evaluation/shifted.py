"""The field's shifted test sets: accuracy under eleven class priors, from logits collected once.

Zhang et al. 2022, arXiv:2107.09249 (SADE), section 5; BalPoE (arXiv:2206.05260) reports the same sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.longtail import class_sizes
from .metrics import percent
from .tables import number, text_table
from .test_prior import estimate_log_prior

RATIOS = (50, 25, 10, 5, 2)  # images of the most frequent class over those of the rarest


@dataclass(frozen=True, eq=False)
class ShiftedSet:
    """Rows [n] of a test set, with the most images of frequent (forward) or rare (backward) training classes."""

    direction: str
    ratio: int
    rows: np.ndarray


def shifted_sets(targets: np.ndarray, class_counts: Sequence[int]) -> tuple[list[ShiftedSet], list[int]]:
    """The sets from forward 50 over uniform to backward 50, and the ratios for which the test set is too small.

    targets [N] of the test set; class_counts [C]: training images of each class, whose order the sets follow. The class
    of rank k, of those with test images, keeps int(n * ratio^(-k / (K - 1))) of them, n being the images of the class
    with the fewest. As in SADE's code for CIFAR, one legacy NumPy generator of seed 0 shuffles the images of all
    classes in turn, and the first ones are kept, so that smaller sets are contained in larger ones.
    """
    available = np.bincount(targets, minlength=len(class_counts))
    by_class = np.split(np.argsort(targets, kind="stable"), np.cumsum(available)[:-1])
    generator = np.random.RandomState(0)
    for rows in by_class:
        generator.shuffle(rows)
    ranked = [c for c in np.argsort(-np.asarray(class_counts), kind="stable") if available[c]]
    smallest = int(available[ranked].min())

    def select(direction: str, ratio: int) -> ShiftedSet:
        sizes = class_sizes(smallest * len(ranked), len(ranked), "exp", 1 / ratio)
        order = ranked if direction == "forward" else ranked[::-1]
        rows = [by_class[c][:size] for c, size in zip(order, sizes, strict=True)]
        return ShiftedSet(direction, ratio, np.sort(np.concatenate(rows)))

    ratios = [ratio for ratio in RATIOS if ratio <= smallest]
    sets = [select("forward", ratio) for ratio in ratios] + [select("uniform", 1)]
    return sets + [select("backward", ratio) for ratio in reversed(ratios)], [r for r in RATIOS if r > smallest]


def shifted_accuracies(
    logits: Tensor, targets: Tensor, class_counts: Sequence[int], log_model_prior: Tensor
) -> list[dict[str, Any]]:
    """Accuracy on each of `shifted_sets`, in percent over its images.

    logits [N, C], targets [N], class_counts [C], log_model_prior [C]: which the logits suit. -> "direction", "ratio",
    "images", "accuracy" of the bare logits, "known_prior" and "estimated_prior": of those moved to the set's own prior,
    and to the one estimated without labels (`estimate_log_prior`).
    """
    results = []
    for part in shifted_sets(targets.numpy(), class_counts)[0]:
        own, labels = logits[part.rows], targets[part.rows]
        known = (torch.bincount(labels, minlength=len(class_counts)) / len(labels)).log()
        estimated = estimate_log_prior(own, log_model_prior)
        shifts = dict(accuracy=0.0, known_prior=known - log_model_prior, estimated_prior=estimated - log_model_prior)
        result: dict[str, Any] = dict(direction=part.direction, ratio=part.ratio, images=len(labels))
        for name, shift in shifts.items():
            result[name] = percent(((own + shift).argmax(1) == labels).sum(), len(labels))
        results.append(result)
    return results


def shifted_table(results: Sequence[dict[str, Any]]) -> str:
    """A text table of `shifted_accuracies`."""
    lines = [["test set", "images", "accuracy", "known prior", "estimated prior"]]
    for row in results:
        name = row["direction"] if row["ratio"] == 1 else f"{row['direction']} {row['ratio']}"
        cells = (number(row[key]) for key in ("accuracy", "known_prior", "estimated_prior"))
        lines.append([name, f"{row['images']:,}", *cells])
    return text_table(lines)

"""Metrics of a test set by shot group: accuracy, calibration, expert diversity.

Accuracies of a group are over its test images, as the authors report them; class means weigh every class equally, for
test sets of unequal classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import write_csv
from ..priors import shot_groups
from .confusions import largest_confusions
from .counts import Counts
from .tables import GROUPS

CURVE_POINTS = 20


def compute_metrics(
    counts: Counts, class_counts: Sequence[int] | None, shots: tuple[int, int] = (100, 20)
) -> dict[str, Any]:
    """All metrics: accuracies in percent, fractions in [0, 1], None over nothing.

    class_counts [C]: training images of each class, None if unknown; shots: many-shot classes have more of them than
    the first, few-shot classes fewer than the second. InputError for counts of another number of classes. ->

    "all", "many", "medium", "few", "top5": accuracy over images; "class_mean", "per_class" [C]; "class_means" by group;
    "precision", "recall" and "f1": see `precision_recall_f1`; "confusions": see `confusions.largest_confusions`;
    "worst_class", and "harmonic_mean" over classes (0 if one class is never right), from Du & Wu 2023,
    arXiv:2303.03630; "head_to_tail", "calibration" and "reliability" by group: see the functions below; "experts":
    see `expert_metrics`; "experts_used" [E] and "experts_used_by_group", fractions of images that used 1, 2, … experts.
    """
    num_classes = len(counts.images)
    if class_counts is not None and len(class_counts) != num_classes:
        raise InputError(f"expected {num_classes} class counts, got {len(class_counts)}")
    groups = group_masks(class_counts, num_classes, shots)
    per_class = [percent(r, n) for r, n in zip(counts.right.tolist(), counts.images.tolist(), strict=True)]
    metrics: dict[str, Any] = {n: percent(counts.right[g].sum(), counts.images[g].sum()) for n, g in groups.items()}
    metrics["top5"] = percent(counts.top5.sum(), counts.images.sum())
    means = {name: _mean([per_class[c] for c in np.flatnonzero(group)]) for name, group in groups.items()}
    tested = [accuracy for accuracy in per_class if accuracy is not None]
    metrics |= dict(class_mean=means["all"], per_class=per_class, class_means=means)
    metrics |= dict(worst_class=min(tested, default=None), harmonic_mean=harmonic_mean(tested))
    metrics |= precision_recall_f1(counts)
    metrics["confusions"] = largest_confusions(counts)
    if class_counts is not None:
        metrics["head_to_tail"] = head_to_tail(per_class, class_counts)
    metrics["reliability"] = {name: reliability(counts, group) for name, group in groups.items()}
    metrics["calibration"] = {name: calibration(bins) for name, bins in metrics["reliability"].items()}
    if counts.member_right is not None:
        metrics["experts"] = expert_metrics(counts, groups)
    if counts.used is not None:
        metrics["experts_used"] = _fractions(counts.used.sum(0))
        metrics["experts_used_by_group"] = {
            name: _fractions(counts.used[group].sum(0)) if counts.images[group].sum() else None
            for name, group in groups.items()
        }
    return metrics


def group_masks(
    class_counts: Sequence[int] | None, num_classes: int, shots: tuple[int, int] = (100, 20)
) -> dict[str, np.ndarray]:
    """The classes of each of `GROUPS`, bool [C]; of "all" only if counts are unknown."""
    everyone = np.ones(num_classes, dtype=bool)
    if class_counts is None:
        return {"all": everyone} | dict.fromkeys(GROUPS[1:], ~everyone)
    return {"all": everyone} | {name: mask.numpy() for name, mask in shot_groups(class_counts, *shots).items()}


def precision_recall_f1(counts: Counts) -> dict[str, Any]:
    """Precision, recall and F1 in percent: by class, their mean, and weighted by test images.

    -> "precision", "recall", "f1": {"per_class" [C], "macro", "weighted"}. None for the precision of a class that is
    never predicted, which counts 0 in the means, and for what needs a test image; the means are over classes with one.
    """
    predicted = np.bincount(counts.predictions, minlength=len(counts.images))
    parts = dict(
        precision=(counts.right, predicted),
        recall=(counts.right, counts.images),
        f1=(2 * counts.right, np.where(counts.images, counts.images + predicted, 0)),
    )
    metrics = {}
    for name, (part, total) in parts.items():
        by_class = [percent(r, n) for r, n in zip(part.tolist(), total.tolist(), strict=True)]
        values = np.array([value or 0.0 for value in by_class])[counts.images > 0]
        weights = counts.images[counts.images > 0]
        weighted = float(np.average(values, weights=weights)) if len(values) else None
        metrics[name] = dict(per_class=by_class, macro=_mean(values.tolist()), weighted=weighted)
    return metrics


def write_class_metrics(path: Path, counts: Counts, class_counts: Sequence[int], class_names: Sequence[str]) -> None:
    """Write a CSV row for each class: its training and test images; precision, recall and F1 in percent."""
    measured = [part["per_class"] for part in precision_recall_f1(counts).values()]
    heading = ["class", "training images", "test images", "precision", "recall", "f1"]
    write_csv(path, heading, zip(class_names, class_counts, counts.images.tolist(), *measured, strict=True))


def harmonic_mean(accuracies: Sequence[float]) -> float | None:
    """Harmonic mean of accuracies; 0 if one of them is 0, None if there are none."""
    if not accuracies:
        return None
    return 0.0 if min(accuracies) == 0 else len(accuracies) / sum(1 / accuracy for accuracy in accuracies)


def head_to_tail(per_class: Sequence[float | None], class_counts: Sequence[int]) -> list[dict[str, Any]]:
    """Accuracy from the most to the least frequent class, in at most 20 runs.

    A run is the mean of neighbouring classes, nearly as many in each.
    -> for each run: "classes", their number; "train_images", their mean number of training images; "accuracy", the
    mean of their accuracies in percent. Classes of equal counts keep their order.
    """
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    edges = np.linspace(0, len(order), min(CURVE_POINTS, len(order)) + 1).round().astype(int)
    return [
        dict(
            classes=int(stop - start),
            train_images=float(np.mean([class_counts[c] for c in order[start:stop]])),
            accuracy=_mean([per_class[c] for c in order[start:stop]]),
        )
        for start, stop in pairwise(edges.tolist())
    ]


def reliability(counts: Counts, group: np.ndarray) -> list[dict[str, Any]]:
    """Reliability diagram of a group, one row per bin of confidence ((m-1)/15, m/15].

    -> "images" of the bin, and their mean "confidence" and "accuracy" in percent.
    Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    images, right, sums = (part[group].sum(0) for part in (counts.binned, counts.binned_right, counts.confidence))
    return [
        dict(images=int(n), confidence=percent(s, n), accuracy=percent(r, n))
        for n, r, s in zip(images, right, sums, strict=True)
    ]


def calibration(bins: list[dict[str, Any]]) -> dict[str, Any]:
    """Expected calibration error "ece" and mean "confidence" of a diagram, in percent.

    The error is |accuracy - confidence| of each bin, averaged over images. Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    filled = [row for row in bins if row["images"]]
    images = sum(row["images"] for row in filled)
    if not images:
        return dict(ece=None, confidence=None)
    ece = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in filled) / images
    return dict(ece=ece, confidence=sum(row["images"] * row["confidence"] for row in filled) / images)


def expert_metrics(counts: Counts, groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy of each expert, disagreement and diversity of the experts, by group.

    "accuracy": percent, one value per expert. "disagreement": fraction of images that two experts put into different
    classes, averaged over pairs (Fort et al. 2019, arXiv:1912.02757, section 4). "diversity": KL(ensemble || expert) in
    nats, averaged over experts and images; it is the term that RIDE's loss maximises, at temperature 1
    (arXiv:2010.01809, section 3). None without images, or without a pair.
    """
    assert counts.member_right is not None and counts.disagreements is not None and counts.divergence is not None
    num_members = counts.member_right.shape[1]
    pairs = num_members * (num_members - 1) // 2
    metrics: dict[str, Any] = dict(accuracy={}, disagreement={}, diversity={})
    for name, group in groups.items():
        images = int(counts.images[group].sum())
        differing, divergence = counts.disagreements[group].sum(), counts.divergence[group].sum()
        metrics["accuracy"][name] = [percent(right, images) for right in counts.member_right[group].sum(0)]
        metrics["disagreement"][name] = float(differing / (pairs * images)) if pairs * images else None
        metrics["diversity"][name] = float(divergence / (num_members * images)) if images else None
    return metrics


def percent(part: float, total: float) -> float | None:
    """100 part / total; None for a total of zero."""
    return 100 * float(part) / float(total) if total else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _fractions(used: np.ndarray) -> list[float]:
    return [n / max(1, int(used.sum())) for n in used.tolist()]

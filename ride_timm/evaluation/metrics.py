"""What follows from the counts of a test set: accuracies, calibration, and how the experts differ, by shot group.

A group's figures are over its test images, as the authors take them; those by class mean weigh every class alike, for
test sets of unequal classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..priors import shot_groups
from .tables import GROUPS

NUM_BINS = 15  # of the confidences: Guo et al. 2017, arXiv:1706.04599, section 2
CURVE_POINTS = 20


@dataclass(frozen=True, eq=False)
class Counts:
    """Test images by class, [C]: all, right, right within five; by class and bin of confidence, [C, NUM_BINS]: all,
    right, and the sum of confidences. Where there were such: by class and number of experts used, [C, E]; by class and
    member of the ensemble that was right, [C, M]; by class, the pairs of members that disagreed, and the sum over the
    members of KL(ensemble || member) in nats.
    """

    images: np.ndarray
    right: np.ndarray
    top5: np.ndarray
    binned: np.ndarray
    binned_right: np.ndarray
    confidence: np.ndarray
    used: np.ndarray | None = None
    member_right: np.ndarray | None = None
    disagreements: np.ndarray | None = None
    divergence: np.ndarray | None = None


def figures(counts: Counts, class_counts: Sequence[int] | None, shots: tuple[int, int] = (100, 20)) -> dict[str, Any]:
    """All figures: accuracies in percent, shares as fractions, None where there is nothing to average.

    class_counts [C]: training images of each class, or None where they are unknown; shots: many-shot classes have more
    of them than the first, few-shot classes fewer than the second. ->

    "all", "many", "medium", "few", "top5": accuracy over the images; "class_mean", "per_class" [C]; "class_means" by
    group; "worst_class", and "harmonic_mean" over the classes (0 where a class is never right), the measures of Du & Wu
    2023, arXiv:2303.03630; "head_to_tail": see there; "calibration" and "reliability" by group: see there; "experts":
    see `expert_figures`; "experts_used" [E] and by group, fractions of the images that used 1, 2, … experts.
    """
    groups = group_masks(class_counts, len(counts.images), shots)
    per_class = [_percent(r, n) for r, n in zip(counts.right.tolist(), counts.images.tolist(), strict=True)]
    found: dict[str, Any] = {n: _percent(counts.right[g].sum(), counts.images[g].sum()) for n, g in groups.items()}
    found["top5"] = _percent(counts.top5.sum(), counts.images.sum())
    means = {name: _mean([per_class[c] for c in np.flatnonzero(group)]) for name, group in groups.items()}
    tested = [accuracy for accuracy in per_class if accuracy is not None]
    found |= dict(class_mean=means["all"], per_class=per_class, class_means=means)
    found |= dict(worst_class=min(tested, default=None), harmonic_mean=harmonic_mean(tested))
    if class_counts is not None:
        found["head_to_tail"] = head_to_tail(per_class, class_counts)
    found["reliability"] = {name: reliability(counts, group) for name, group in groups.items()}
    found["calibration"] = {name: calibration(bins) for name, bins in found["reliability"].items()}
    if counts.member_right is not None:
        found["experts"] = expert_figures(counts, groups)
    if counts.used is not None:
        found["experts_used"] = _shares(counts.used.sum(0))
        found["experts_used_by_group"] = {
            name: _shares(counts.used[group].sum(0)) if counts.images[group].sum() else None
            for name, group in groups.items()
        }
    return found


def group_masks(
    class_counts: Sequence[int] | None, num_classes: int, shots: tuple[int, int] = (100, 20)
) -> dict[str, np.ndarray]:
    """Which classes belong to "all", "many", "medium" and "few", bool [C]; without class counts, to "all" alone."""
    everyone = np.ones(num_classes, dtype=bool)
    if class_counts is None:
        return {"all": everyone} | dict.fromkeys(GROUPS[1:], ~everyone)
    return {"all": everyone} | {name: mask.numpy() for name, mask in shot_groups(class_counts, *shots).items()}


def harmonic_mean(accuracies: Sequence[float]) -> float | None:
    """Of accuracies in percent; 0 where one is 0, None where there are none."""
    if not accuracies:
        return None
    return 0.0 if min(accuracies) == 0 else len(accuracies) / sum(1 / accuracy for accuracy in accuracies)


def head_to_tail(per_class: Sequence[float | None], class_counts: Sequence[int]) -> list[dict[str, Any]]:
    """Accuracy from the most to the least frequent class, in at most 20 runs of classes of nearly the same length.

    -> a row for each run: "classes", the mean of their training images, "train_images", and of their accuracies,
    "accuracy" (percent). Classes of equal counts stand in the order of their numbers.
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
    """The reliability diagram of some classes: for each bin of confidence ((m-1)/15, m/15] its "images", their mean
    "confidence" and "accuracy" (both percent). Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    images, right, sums = (part[group].sum(0) for part in (counts.binned, counts.binned_right, counts.confidence))
    return [
        dict(images=int(n), confidence=_percent(s, n), accuracy=_percent(r, n))
        for n, r, s in zip(images, right, sums, strict=True)
    ]


def calibration(bins: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a reliability diagram: "ece", the expected calibration error, |accuracy - confidence| averaged over the images
    by bin, and the mean "confidence", both in percent. Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    filled = [row for row in bins if row["images"]]
    images = sum(row["images"] for row in filled)
    if not images:
        return dict(ece=None, confidence=None)
    ece = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in filled) / images
    return dict(ece=ece, confidence=sum(row["images"] * row["confidence"] for row in filled) / images)


def expert_figures(counts: Counts, groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """How the members of an ensemble do alone and how they differ, by group.

    "accuracy": of each member alone, percent. "disagreement": share of images for which two members answer with
    different classes, averaged over the pairs (Fort et al. 2019, arXiv:1912.02757, section 4). "diversity":
    KL(ensemble || member) in nats, averaged over members and images: the term that RIDE's loss drives up, at
    temperature 1 (arXiv:2010.01809, section 3). None for what has no images, or no pair.
    """
    num_members = counts.member_right.shape[1]
    pairs = num_members * (num_members - 1) // 2
    rows = {}
    for name, group in groups.items():
        images = int(counts.images[group].sum())
        differing, divergence = (part[group].sum() for part in (counts.disagreements, counts.divergence))
        rows[name] = dict(
            accuracy=[_percent(r, images) for r in counts.member_right[group].sum(0)],
            disagreement=float(differing / (pairs * images)) if pairs * images else None,
            diversity=float(divergence / (num_members * images)) if images else None,
        )
    return {key: {name: row[key] for name, row in rows.items()} for key in ("accuracy", "disagreement", "diversity")}


def _percent(part: float, whole: float) -> float | None:
    return 100 * float(part) / float(whole) if whole else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shares(used: np.ndarray) -> list[float]:
    return [n / max(1, int(used.sum())) for n in used.tolist()]

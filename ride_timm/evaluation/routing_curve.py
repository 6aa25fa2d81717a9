"""Accuracy and MACs at every routing threshold, exactly, from one pass."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..models import Ride
from .macs import Macs
from .metrics import group_masks, percent
from .tables import GROUPS

Point = dict[str, Any]  # threshold, macs, all, many, medium, few, experts_used


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Predictions of all prefixes of the experts: they determine any routing.

    right bool [N, E]: correct prediction of the mean of the first 1, 2, … experts; gates [N, E-1]: gate probabilities
    with all experts run; targets [N].
    """

    right: np.ndarray
    gates: np.ndarray
    targets: np.ndarray

    @property
    def lowest(self) -> np.ndarray:
        """The lowest gate so far [N, E-1]: above the threshold, expert i+1 runs."""
        return np.minimum.accumulate(self.gates, axis=1)

    def experts_used(self, threshold: float) -> np.ndarray:
        """Number of experts that each sample uses at a threshold, [N]."""
        return 1 + (self.lowest > self.gates.dtype.type(threshold)).sum(1)

    def balanced_weights(self) -> np.ndarray:
        """Weights [N] under which classes weigh equally: 1 / samples of the class."""
        return 1 / np.bincount(self.targets)[self.targets]


@torch.inference_mode()
def collect_outcomes(model: Ride, batches: Iterable[tuple[Tensor, Tensor]]) -> Outcomes:
    """Run all experts and gates, in the arithmetic of `forward_routed`.

    batches: images [b, 3, H, W] and targets [b]. InputError for a model without a router.
    """
    if model.router is None:
        raise InputError("this model has no router: train one (stage two).")
    was_training = model.training
    model.eval()
    right, gates, labels = [], [], []
    for images, targets in batches:
        x, total, hits, probabilities = model.trunk(images), None, [], []
        for i, expert in enumerate(model.experts):
            features, logits = expert(x)
            total = logits if total is None else total + logits
            mean = total / (i + 1) if i else total
            hits.append(mean.argmax(1) == targets)
            if i + 1 < model.num_experts:
                probabilities.append(model.router.gate(i, features, mean).sigmoid())
        right.append(torch.stack(hits, 1).cpu())
        gates.append(torch.stack(probabilities, 1).cpu())
        labels.append(targets.cpu())
    model.train(was_training)
    return Outcomes(*(torch.cat(parts).numpy() for parts in (right, gates, labels)))


def _groups(targets: np.ndarray, class_counts: Sequence[int], shots: tuple[int, int]) -> dict[str, np.ndarray]:
    """The samples of each shot group, bool [N]."""
    return {name: mask[targets] for name, mask in group_masks(class_counts, len(class_counts), shots).items()}


def routing_curve(
    outcomes: Outcomes,
    macs: Macs,
    class_counts: Sequence[int],
    weights: np.ndarray | None = None,
    shots: tuple[int, int] = (100, 20),
) -> list[Point]:
    """The Pareto points of all thresholds, from the cheapest to the most accurate.

    A threshold lies midway between two gate probabilities that occur, so that rounding moves no sample across it.
    class_counts [C]: training images of each class; weights [N]: of the samples, 1 by default; shots: thresholds of
    `priors.shot_groups`. "macs" is the mean per image, gates included.
    """
    right, lowest = outcomes.right, outcomes.lowest
    weights = np.ones(len(right)) if weights is None else weights
    groups = _groups(outcomes.targets, class_counts, shots)
    # falling thresholds: at its lowest gate so far, a sample moves from expert i to i+1, which changes the sums
    order = np.argsort(-lowest.ravel(), kind="stable")
    values = lowest.ravel()[order]
    sample, gate = order // lowest.shape[1], order % lowest.shape[1]
    gained = weights[sample] * (right[sample, gate + 1].astype(int) - right[sample, gate])
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # the last change at each value

    def summed(first: float, changes: np.ndarray) -> np.ndarray:  # before any change, and after each value
        return np.append(first, first + np.cumsum(changes)[last])

    sums = {name: summed((weights * right[:, 0])[mask].sum(), gained * mask[sample]) for name, mask in groups.items()}
    totals = {name: weights[mask].sum() for name, mask in groups.items()}
    moved = [summed(0, weights[sample] * (gate == i)) for i in range(lowest.shape[1])]
    reached = np.stack([np.full(len(last) + 1, weights.sum()), *moved, np.zeros(len(last) + 1)])
    fractions = np.maximum(reached[:-1] - reached[1:], 0) / weights.sum()
    thresholds = _thresholds(values[last])

    curve: list[Point] = []
    for k in _improving(sums["all"][: len(thresholds)]):
        used = fractions[:, k].tolist()
        accuracies = {name: percent(sums[name][k], totals[name]) for name in groups}
        curve.append(dict(threshold=thresholds[k], macs=macs.expected(used), **accuracies, experts_used=used))
    return curve


def _thresholds(values: np.ndarray) -> list[float]:
    """Thresholds above, between and below falling gate probabilities."""
    above, below = values[:-1], values[1:]
    middle = below + (above - below) / 2
    middle = np.where(middle < above, middle, below)  # no number lies between neighbouring floats
    least = [0.0] if values[-1] > 0 else []
    return [1.0, *map(float, middle), *least]


def _improving(accuracies: np.ndarray) -> np.ndarray:
    """Indices of values above all earlier ones, by more than the rounding of a sum."""
    best = np.maximum.accumulate(accuracies.round(6))
    return np.flatnonzero(np.append(True, best[1:] > best[:-1]))


def thin(curve: list[Point], most: int = 200) -> list[Point]:
    """At most this many points of a curve, including both ends."""
    if len(curve) <= most:
        return curve
    return [curve[round(k)] for k in np.linspace(0, len(curve) - 1, most)]


def prefix_points(
    outcomes: Outcomes, macs: Macs, class_counts: Sequence[int], shots: tuple[int, int] = (100, 20)
) -> list[Point]:
    """The points of the first 1, 2, … experts on every sample, without gates."""
    groups = _groups(outcomes.targets, class_counts, shots)
    points = []
    for i in range(outcomes.right.shape[1]):
        used = [float(j == i) for j in range(outcomes.right.shape[1])]
        accuracies = {n: percent(outcomes.right[mask, i].sum(), mask.sum()) for n, mask in groups.items()}
        cost = macs.trunk + sum(macs.experts[: i + 1])
        points.append(dict(threshold=None, macs=cost, **accuracies, experts_used=used))
    return points


def curve_table(curve: list[Point], prefixes: list[Point]) -> str:
    """The points as CSV; column "experts" is "routed", or the fixed number of experts."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    keys = ("threshold", "macs", *GROUPS)
    rows.writerow(["experts", *keys, *(f"used_{i + 1}" for i in range(len(prefixes)))])
    for name, point in [("routed", p) for p in curve] + [(i + 1, p) for i, p in enumerate(prefixes)]:
        rows.writerow([name, *(point[key] for key in keys), *point["experts_used"]])
    return text.getvalue()


def check_budget(macs: Macs, macs_budget: float) -> None:
    """InputError for a budget below one expert with its gate."""
    least = macs.expected([1.0] + [0.0] * (len(macs.experts) - 1))
    if not macs_budget >= least:  # NaN fits nothing
        raise InputError(
            f"macs-budget={macs_budget:.6g}: one expert with its gate takes {least:,.0f} MACs per image; "
            f"the smallest budget possible is {np.ceil(least):.0f}."
        )


def point_for_budget(curve: list[Point], macs_budget: float) -> Point:
    """The most accurate point within the budget; InputError if there is none."""
    affordable = [point for point in curve if point["macs"] <= macs_budget]
    if not affordable:
        least = min(point["macs"] for point in curve)
        raise InputError(f"macs-budget={macs_budget:.6g}: the smallest budget possible is {np.ceil(least):.0f}.")
    return max(affordable, key=lambda point: point["all"])

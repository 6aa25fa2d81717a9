"""What every routing threshold would give and cost, exactly, from one pass in which all experts run."""

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
from ..priors import shot_groups
from .macs import Macs
from .tables import GROUPS

Point = dict[str, Any]  # threshold, macs, all, many, medium, few, experts_used


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What becomes of every sample of a set, whatever the threshold.

    right bool [N, E]: is the mean of experts 1…i right; gates [N, E-1]: probabilities, as if all experts ran;
    targets [N].
    """

    right: np.ndarray
    gates: np.ndarray
    targets: np.ndarray

    @property
    def lowest(self) -> np.ndarray:
        """[N, E-1]: expert i+1 runs exactly where this, the lowest gate so far, is above the threshold."""
        return np.minimum.accumulate(self.gates, axis=1)

    def experts_used(self, threshold: float) -> np.ndarray:
        """Experts that each sample uses at a threshold, [N], from 1."""
        return 1 + (self.lowest > self.gates.dtype.type(threshold)).sum(1)

    def balanced_weights(self) -> np.ndarray:
        """Weights [N] that make every class count alike: one over the number of its samples."""
        return 1 / np.bincount(self.targets)[self.targets]


@torch.inference_mode()
def collect_outcomes(model: Ride, batches: Iterable[tuple[Tensor, Tensor]]) -> Outcomes:
    """Run all experts and gates on (images [b, 3, H, W], targets [b]); the arithmetic is that of `forward_routed`."""
    if model.router is None:
        raise InputError("this model has no router: train one (stage two) to see what thresholds give.")
    was_training = model.training
    model.eval()
    right, gates, labels = [], [], []
    for images, targets in batches:
        x, total, hits, opened = model.trunk(images), None, [], []
        for i, expert in enumerate(model.experts):
            features, logits = expert(x)
            total = logits if total is None else total + logits
            mean = total / (i + 1) if i else total
            hits.append(mean.argmax(1) == targets)
            if i + 1 < model.num_experts:
                opened.append(model.router.gate(i, features, mean).sigmoid())
        right.append(torch.stack(hits, 1).cpu())
        gates.append(torch.stack(opened, 1).cpu())
        labels.append(targets.cpu())
    model.train(was_training)
    return Outcomes(*(torch.cat(parts).numpy() for parts in (right, gates, labels)))


def _groups(targets: np.ndarray, class_counts: Sequence[int], shots: tuple[int, int]) -> dict[str, np.ndarray]:
    """Which samples each accuracy is over: all, and by the shots of their class."""
    groups = {name: mask.numpy()[targets] for name, mask in shot_groups(class_counts, *shots).items()}
    return {"all": np.ones(len(targets), dtype=bool)} | groups


def _percent(right: float, weight: float) -> float | None:
    return float(100 * right / weight) if weight else None


def routing_curve(
    outcomes: Outcomes,
    macs: Macs,
    class_counts: Sequence[int],
    weights: np.ndarray | None = None,
    shots: tuple[int, int] = (100, 20),
) -> list[Point]:
    """One point for every threshold that makes a difference, from the cheapest to the dearest, Pareto points only.

    A point is better than all that cost less. Its threshold stands midway between two gate probabilities that occur,
    so that rounding does not move a sample across it. class_counts [C]: training images of each class; weights [N]:
    of each sample in accuracies and shares, 1 by default; shots: thresholds of `priors.shot_groups`. "macs" is the
    expected cost of an image, gates included.
    """
    right, lowest = outcomes.right, outcomes.lowest
    weights = np.ones(len(right)) if weights is None else weights
    groups = _groups(outcomes.targets, class_counts, shots)
    # Below the value of its lowest gate so far, a sample goes on from expert i to i+1: an event that changes the sums.
    order = np.argsort(-lowest.ravel(), kind="stable")
    values = lowest.ravel()[order]
    sample, gate = order // lowest.shape[1], order % lowest.shape[1]
    gained = weights[sample] * (right[sample, gate + 1].astype(int) - right[sample, gate])
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # the last event of each value

    def summed(first: float, changes: np.ndarray) -> np.ndarray:  # a sum before any event, and after each value
        return np.append(first, first + np.cumsum(changes)[last])

    sums = {
        name: summed((weights * right[:, 0])[members].sum(), gained * members[sample])
        for name, members in groups.items()
    }
    whole = {name: weights[members].sum() for name, members in groups.items()}
    going = [summed(0, weights[sample] * (gate == i)) for i in range(lowest.shape[1])]
    reached = np.stack([np.full(len(last) + 1, weights.sum()), *going, np.zeros(len(last) + 1)])
    shares = np.maximum(reached[:-1] - reached[1:], 0) / weights.sum()
    thresholds = _thresholds(values[last])

    curve: list[Point] = []
    for k in _improving(sums["all"][: len(thresholds)]):
        used = shares[:, k].tolist()
        accuracies = {name: _percent(sums[name][k], whole[name]) for name in groups}
        curve.append(dict(threshold=thresholds[k], macs=macs.expected(used), **accuracies, experts_used=used))
    return curve


def _thresholds(values: np.ndarray) -> list[float]:
    """Falling gate probabilities -> a threshold above the first, one between each two, and one below the last."""
    above, below = values[:-1], values[1:]
    middle = below + (above - below) / 2
    middle = np.where(middle < above, middle, below)  # neighbouring numbers have nothing between them
    least = [0.0] if values[-1] > 0 else []
    return [1.0, *map(float, middle), *least]


def _improving(accuracies: np.ndarray) -> np.ndarray:
    """Indices of the values above all before them, by more than the rounding of a sum."""
    best = np.maximum.accumulate(accuracies.round(6))
    return np.flatnonzero(np.append(True, best[1:] > best[:-1]))


def thin(curve: list[Point], most: int = 200) -> list[Point]:
    """At most so many points of a curve, its ends among them."""
    if len(curve) <= most:
        return curve
    return [curve[round(k)] for k in np.linspace(0, len(curve) - 1, most)]


def prefix_points(
    outcomes: Outcomes, macs: Macs, class_counts: Sequence[int], shots: tuple[int, int] = (100, 20)
) -> list[Point]:
    """What the first 1, 2, … experts give if every sample uses them all and no gate is asked."""
    groups = _groups(outcomes.targets, class_counts, shots)
    points = []
    for i in range(outcomes.right.shape[1]):
        used = [float(j == i) for j in range(outcomes.right.shape[1])]
        accuracies = {n: _percent(outcomes.right[mask, i].sum(), mask.sum()) for n, mask in groups.items()}
        cost = macs.trunk + sum(macs.experts[: i + 1])
        points.append(dict(threshold=None, macs=cost, **accuracies, experts_used=used))
    return points


def curve_table(curve: list[Point], prefixes: list[Point]) -> str:
    """The points as CSV; column "experts" says "routed", or how many experts every sample uses."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    keys = ("threshold", "macs", *GROUPS)
    rows.writerow(["experts", *keys, *(f"used_{i + 1}" for i in range(len(prefixes)))])
    for name, point in [("routed", p) for p in curve] + [(i + 1, p) for i, p in enumerate(prefixes)]:
        rows.writerow([name, *(point[key] for key in keys), *point["experts_used"]])
    return text.getvalue()


def check_budget(macs: Macs, macs_budget: float) -> None:
    """InputError where not even one expert and its gate fit into the budget."""
    least = macs.expected([1.0] + [0.0] * (len(macs.experts) - 1))
    if not macs_budget >= least:  # NaN fits nothing
        raise InputError(
            f"macs-budget={macs_budget:.6g}: one expert with its gate takes {least:,.0f} MACs an image already; "
            f"the smallest budget possible is {np.ceil(least):.0f}."
        )


def point_for_budget(curve: list[Point], macs_budget: float) -> Point:
    """The most accurate point whose expected MACs stay within the budget; InputError where none does."""
    affordable = [point for point in curve if point["macs"] <= macs_budget]
    if not affordable:
        least = min(point["macs"] for point in curve)
        raise InputError(f"macs-budget={macs_budget:.6g}: the smallest possible is {np.ceil(least):.0f}.")
    return max(affordable, key=lambda point: point["all"])


def threshold_for_budget(curve: list[Point], macs_budget: float) -> float:
    """The threshold of `point_for_budget`."""
    return point_for_budget(curve, macs_budget)["threshold"]

"""Ways to skip experts, at equal cost: the router by one threshold or one a gate, and two that train nothing.

The margin of the running mean continues while the two largest probabilities are close; agreement runs two experts, and
the others where the two differ. Thresholds are chosen on one half of the test images and measured on the other, and the
reverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from record import parse, parser, record

from ride_timm.data.load import load_longtail
from ride_timm.data.loaders import make_loader
from ride_timm.evaluation.evaluate import evaluation_batch
from ride_timm.evaluation.macs import Macs, count_macs
from ride_timm.evaluation.metrics import group_masks
from ride_timm.evaluation.tables import text_table
from ride_timm.inference.load import data_recipe, load_ride

ONE, EACH = 200, 40  # thresholds tried: of a single one, of each gate


@dataclass(frozen=True)
class Images:
    """Outcomes and scores of N images, which every way routes by.

    right bool [N, E]: the mean of the first 1, 2, … experts is; gates [N, E-1]: probabilities of the router; margins
    [N, E-1]: of the same means' probabilities; agree bool [N]: the first two experts do; targets [N].
    """

    right: np.ndarray
    gates: np.ndarray
    margins: np.ndarray
    agree: np.ndarray
    targets: np.ndarray

    def part(self, rows: np.ndarray) -> Images:
        return Images(**{name: values[rows] for name, values in vars(self).items()})


@torch.inference_mode()
def collect(model: Any, batches: Any) -> Images:
    """One pass over the test images, all experts and gates."""
    parts = []
    for images, targets in batches:
        features, logits = model.forward_experts(images)
        means = logits.cumsum(1) / torch.arange(1, model.num_experts + 1)[:, None]
        top = means.softmax(2).topk(2, 2).values[:, :-1]
        own = logits[:, :2].argmax(2)
        gates = model.router(features, logits).sigmoid()
        right = means.argmax(2) == targets[:, None]
        parts.append((right, gates, top[..., 0] - top[..., 1], own[:, 0] == own[:, 1], targets))
    return Images(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def by_thresholds(scores: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """Experts used [N], where expert i + 1 runs while score i is above threshold i."""
    return 1 + np.cumprod(scores > np.asarray(thresholds, dtype=scores.dtype), axis=1).sum(1)


def fit(images: Images, scores: np.ndarray, macs: Macs, budget: float, per_gate: bool) -> tuple[float, ...]:
    """The most accurate thresholds whose mean MACs are within the budget, classes weighing equally."""
    gates = scores.shape[1]
    levels = np.linspace(0, 1, EACH if per_gate else ONE)
    columns = np.quantile(scores, levels, axis=0).T if per_gate else np.quantile(scores, levels)[None]
    choices = itertools.product(*columns) if per_gate else ((value,) * gates for value in columns[0])
    weights = 1 / np.bincount(images.targets)[images.targets]
    best, chosen = -1.0, None
    for thresholds in choices:
        used = by_thresholds(scores, thresholds)
        if cost(used, macs) <= budget:
            accuracy = float((weights * images.right[np.arange(len(used)), used - 1]).sum())
            if accuracy > best:
                best, chosen = accuracy, thresholds
    assert chosen is not None, "the budget is below one expert"
    return tuple(map(float, chosen))


def fractions(used: np.ndarray, experts: int) -> list[float]:
    return [float((used == i + 1).mean()) for i in range(experts)]


def cost(used: np.ndarray, macs: Macs) -> float:
    return macs.expected(fractions(used, len(macs.experts)))


Way = Callable[[Images, Images], np.ndarray]  # (images to choose on, images to route) -> experts used


def ways(macs: Macs, budget: float) -> dict[str, tuple[Macs, Way]]:
    """By name: the MACs to count, and the way."""
    ungated = replace(macs, gates=(0.0,) * len(macs.gates))
    experts = len(macs.experts)

    def thresholds(scores: Callable[[Images], np.ndarray], counted: Macs, per_gate: bool = False) -> tuple[Macs, Way]:
        def way(chosen_on: Images, images: Images) -> np.ndarray:
            return by_thresholds(scores(images), fit(chosen_on, scores(chosen_on), counted, budget, per_gate))

        return counted, way

    return {
        "all experts": (ungated, lambda _, images: np.full(len(images.targets), experts)),
        "router, one threshold": thresholds(lambda images: images.gates, macs),
        "router, one a gate": thresholds(lambda images: images.gates, macs, per_gate=True),
        "margin, one threshold": thresholds(lambda images: -images.margins, ungated),
        "margin, one an expert": thresholds(lambda images: -images.margins, ungated, per_gate=True),
        "first two agree": (ungated, lambda _, images: np.where(images.agree, 2, experts)),
    }


def compare(images: Images, macs: Macs, class_counts: list[int], budget: float, shots: tuple[int, int]) -> list[dict]:
    """Accuracy by shot group, MACs and experts used of every way; budget: in MACs."""
    halves = np.random.default_rng(0).permutation(len(images.targets))
    halves = np.array_split(halves, 2)
    masks = group_masks(class_counts, len(class_counts), shots)
    rows = []
    for name, (counted, way) in ways(macs, budget).items():
        used = np.zeros(len(images.targets), dtype=int)
        for own, other in (halves, halves[::-1]):
            used[own] = way(images.part(other), images.part(own))
        right = images.right[np.arange(len(used)), used - 1]
        row = dict(way=name, macs=cost(used, counted), experts_used=fractions(used, len(macs.experts)))
        in_group = {group: mask[images.targets] for group, mask in masks.items()}
        rows.append(row | {group: 100 * float(right[m].mean()) if m.any() else None for group, m in in_group.items()})
    return rows


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", required=True, help="run folder or release with a router")
    flags.add_argument("--data-dir", help="folder of its data set, if not on the Hub")
    flags.add_argument("--budget", type=float, default=0.75, help="fraction of the MACs of all experts")
    args = parse(flags, argv)
    recipe = data_recipe(None, args.model, {"data_dir": args.data_dir} if args.data_dir else {})
    model = load_ride(args.model, routed=True).to(memory_format=torch.channels_last)
    data = load_longtail(**recipe.data_args)
    size = recipe.policy.input_size(recipe.input_size)
    macs = count_macs(model, (model.in_chans, size, size))
    options = dict(train=False, batch_size=evaluation_batch(size), seed=0, input_size=size)
    images = collect(model, make_loader(data.test, recipe.policy, **options))
    rows = compare(images, macs, data.class_counts, args.budget * macs.ensemble, recipe.shots)
    lines = [["", "all", "many", "medium", "few", "MACs", "experts used"]]
    for row in rows:
        accuracies = ["–" if row[group] is None else f"{row[group]:.2f}" for group in ("all", "many", "medium", "few")]
        used = " / ".join(f"{100 * fraction:.1f}" for fraction in row["experts_used"])
        lines.append([row["way"], *accuracies, f"{100 * row['macs'] / macs.ensemble:.1f} %", f"{used} %"])
    print(text_table(lines))
    record("routers", args, dict(rows=rows, ensemble_macs=macs.ensemble))
    lost = rows[0]["all"] - max(row["all"] for row in rows if row["way"].startswith("router"))
    print(f"lost by the better router {lost:.2f} points")


if __name__ == "__main__":
    main()

"""Plots of a run or a release, from its metrics; they need matplotlib.

curves.png: loss and accuracy by epoch. classes.png: accuracy of the classes from head to tail. reliability.png:
accuracy by confidence. experts.png: the experts alone, how they differ, how many a router uses. routing.png: accuracy
against MACs. Shot groups have the same colours in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import write_atomically
from .metrics import group_masks
from .tables import GROUPS, STAGE_NAMES, number

Rows = dict[str, dict[str, Any]]  # metrics of `compute_metrics` by name, such as "ensemble" and "routed"

COLOURS = {"all": "#4d4d4d", "many": "#3b6ea8", "medium": "#e0993e", "few": "#b8433a"}
_ENSEMBLE, _EXPERTS = COLOURS["all"], ("#0b525b", "#2a9d8f", "#8ac9b8", "#c9e4db", "#8d7bb8", "#c3b9dd")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
}
_MAX_BARS = 100  # above so many classes, each bar is the mean of neighbouring ones


def plot_run(
    folder: Path,
    history: list[dict[str, Any]],
    results: dict[str, Any],
    class_names: Sequence[str],
    shots: tuple[int, int],
) -> None:
    """Draw curves.png and the plots of a run's results; nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        return
    plot_curves(folder / "curves.png", history)
    rows = {STAGE_NAMES[stage]: metrics for stage, metrics in results["stages"].items()}
    plot_metrics(folder, rows, results["class_counts"], class_names, shots)


def plot_metrics(
    folder: Path, rows: Rows, class_counts: Sequence[int], class_names: Sequence[str], shots: tuple[int, int]
) -> None:
    """Draw classes.png, reliability.png and experts.png."""
    plot_classes(folder / "classes.png", rows, class_counts, class_names, shots)
    plot_reliability(folder / "reliability.png", rows)
    plot_experts(folder / "experts.png", rows)


def plot_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw training loss and test accuracy by epoch, one line of panels per stage."""
    titles = {"experts": "stage one, experts", "router": "stage two, router"}
    stages = [stage for stage in titles if any(row["stage"] == stage for row in history)]
    figure, grid = _panels(len(stages), 2, 9, 2.8, sharex="row")
    for (left, right), stage in zip(grid, stages, strict=True):
        rows = [row for row in history if row["stage"] == stage]
        tested = [row for row in rows if row["all"] is not None]
        left.plot([row["epoch"] for row in rows], [row["loss"] for row in rows], marker=".", color="black")
        left.set(title=f"{titles[stage]}: training loss", ylabel="loss")
        for group in GROUPS:
            heights = [np.nan if row[group] is None else row[group] for row in tested]
            right.plot([row["epoch"] for row in tested], heights, marker=".", color=COLOURS[group], label=group)
        right.set(title=f"{titles[stage]}: test accuracy", ylabel="accuracy (%)", ylim=(0, 100))
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*grid[0][1].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(figure, path)


def plot_classes(
    path: Path, rows: Rows, class_counts: Sequence[int], class_names: Sequence[str], shots: tuple[int, int]
) -> None:
    """Draw training images and test accuracy of every class, from head to tail.

    class_counts [C] and class_names [C]; shots: thresholds of `priors.shot_groups`, those of the metrics in rows.
    """
    counts = np.asarray(class_counts)
    order = np.argsort(-counts, kind="stable")
    bars = _bars(order, group_masks(class_counts, len(counts), shots))
    figure, grid = _panels(1 + len(rows), 1, 8, 1.8, height_ratios=[1, *[1.8] * len(rows)], sharex=True)
    panels = [line[0] for line in grid]
    centres = [(start + stop - 1) / 2 for start, stop, _ in bars]
    widths = [(stop - start) * (0.8 if len(order) <= 40 else 1) for start, stop, _ in bars]
    colours = [COLOURS[group] for *_, group in bars]
    images = [counts[order[start:stop]].mean() for start, stop, _ in bars]
    panels[0].bar(centres, images, widths, color=colours)
    panels[0].set(title="training images per class", yscale="log", ylabel="images")
    for axes, (name, metrics) in zip(panels[1:], rows.items(), strict=True):
        accuracies = np.asarray(metrics["per_class"], dtype=float)[order]  # NaN: no test image
        means = [accuracies[start:stop][~np.isnan(accuracies[start:stop])] for start, stop, _ in bars]
        axes.bar(centres, [mean.mean() if len(mean) else 0 for mean in means], widths, color=colours)
        groups = ", ".join(f"{group} {number(metrics[group], 1)}" for group in GROUPS)
        axes.set(title=f"test accuracy, {name} ({groups})", ylabel="accuracy (%)", ylim=(0, 100))
    for group in (group for group in GROUPS[1:] if any(group == bar[2] for bar in bars)):
        panels[0].bar(0, 0, color=COLOURS[group], label=f"{group}-shot")
    panels[0].legend(frameon=False, ncols=3)
    if len(order) <= 20:
        panels[-1].set_xticks(centres, [class_names[c] for c in order], rotation=30, ha="right")
    else:
        panels[-1].set_xlabel("classes, from most to fewest training images")
    _save(figure, path)


def _bars(order: np.ndarray, groups: dict[str, np.ndarray]) -> list[tuple[int, int, str]]:
    """Runs of classes within a shot group, in this order: (start, stop, group)."""
    bars = []
    start = 0
    for group in GROUPS[1:]:
        size = int(groups[group].sum())
        parts = size if len(order) <= _MAX_BARS else -(-size * _MAX_BARS // len(order))
        edges = start + np.linspace(0, size, parts + 1).round().astype(int) if size else []
        bars += [(int(first), int(last), group) for first, last in pairwise(edges)]
        start += size
    return bars


def plot_reliability(path: Path, rows: Rows) -> None:
    """Draw reliability diagrams by shot group, below histograms of confidence."""
    figure, grid = _panels(2 * len(rows), len(GROUPS), 11, 1.7, height_ratios=[1, 2.5] * len(rows), sharex=True)
    for i, (name, metrics) in enumerate(rows.items()):
        for above, below, group in zip(grid[2 * i], grid[2 * i + 1], GROUPS, strict=True):
            bins, ece = metrics["reliability"][group], metrics["calibration"][group]["ece"]
            edges = np.linspace(0, 100, len(bins) + 1)
            total = max(1, sum(row["images"] for row in bins))
            fractions = [100 * row["images"] / total for row in bins]
            above.stairs(fractions, edges, fill=True, color="#b5b5b5")
            above.set(title=f"{name}, {group}: " + ("no images" if ece is None else f"ECE {ece:.1f} %"), ylim=(0, 100))
            below.stairs([row["accuracy"] or 0 for row in bins], edges, fill=True, color=COLOURS[group], alpha=0.8)
            below.plot([0, 100], [0, 100], "--", color="black", linewidth=1)
            below.set(xlim=(0, 100), ylim=(0, 100))
        grid[2 * i][0].set_ylabel("images (%)")
        grid[2 * i + 1][0].set_ylabel("accuracy (%)")
    for axes in grid[-1]:
        axes.set_xlabel("confidence (%)")
    _save(figure, path)


def plot_experts(path: Path, rows: Rows) -> None:
    """Draw accuracy, disagreement and diversity of the experts, or how many are used.

    Disagreement and diversity as in `metrics.expert_metrics`.
    """
    figure, grid = _panels(len(rows), 3, 12, 3, width_ratios=[1.4, 1, 1])
    for (left, middle, right), (name, metrics) in zip(grid, rows.items(), strict=True):
        experts, used = metrics.get("experts"), metrics.get("experts_used_by_group")
        bars = [(name, _ENSEMBLE, [metrics[group] for group in GROUPS])]
        if experts:
            numbers = metrics.get("members", range(1, 1 + len(experts["accuracy"]["all"])))
            alone = zip(*(experts["accuracy"][group] for group in GROUPS), strict=True)
            bars += [(f"expert {i}", _colour(k), [*own]) for k, (i, own) in enumerate(zip(numbers, alone, strict=True))]
        width = 0.8 / len(bars)
        for i, (label, colour, heights) in enumerate(bars):
            places = [group + (i + 0.5) * width - 0.4 for group in range(len(GROUPS))]
            left.bar(places, _heights(heights), width, color=colour, label=label)
        left.set(title=f"{name}: accuracy", ylabel="accuracy (%)", ylim=(0, 100))
        _legend_below(left)
        colours = [COLOURS[group] for group in GROUPS]
        if experts and len(bars) > 2:
            disagreement = [100 * value for value in _heights([experts["disagreement"][group] for group in GROUPS])]
            middle.bar(GROUPS, disagreement, color=colours)
            middle.set(title="disagreement of two experts", ylabel="images (%)", ylim=(0, 100))
            right.bar(GROUPS, _heights([experts["diversity"][group] for group in GROUPS]), color=colours)
            right.set(title="diversity of the experts", ylabel="KL(ensemble || expert), nats")
        elif used:
            fractions = 100 * np.array([used[group] or [0] * len(used["all"]) for group in GROUPS])
            for i, own in enumerate(fractions.T):
                middle.bar(GROUPS, own, color=_colour(i), bottom=fractions[:, :i].sum(1), label=str(i + 1))
            middle.set(title=f"{name}: number of experts used", ylabel="images (%)", ylim=(0, 100))
            _legend_below(middle)
            right.set_axis_off()
        else:
            middle.set_axis_off()
            right.set_axis_off()
        left.set_xticks(range(len(GROUPS)), GROUPS)
    _save(figure, path)


def plot_routing(
    path: Path,
    curve: list[dict[str, Any]],
    prefixes: list[dict[str, Any]],
    chosen: dict[str, Any] | None = None,
) -> None:
    """Draw accuracy against MACs of a router and of fixed numbers of experts.

    A panel per shot group.
    curve and prefixes: points of `routing_curve`; chosen: metrics of a router, marked with its threshold.
    """
    groups = [group for group in GROUPS if curve[0][group] is not None]
    figure, grid = _panels(1, len(groups), 2.9 * len(groups), 3)

    def line(axes: Any, points: list[dict[str, Any]], group: str, *style: str, **more: Any) -> None:
        axes.plot([point["macs"] / 1e6 for point in points], [point[group] for point in points], *style, **more)

    for axes, group in zip(grid[0], groups, strict=True):
        line(axes, prefixes, group, "s--", color="#9aa0a6", linewidth=1, label="1, 2, … experts for all images")
        line(axes, curve, group, color=COLOURS[group], label="router, every threshold")
        for i, point in enumerate(prefixes):
            at = (point["macs"] / 1e6, point[group])
            axes.annotate(str(i + 1), at, (0, -13), textcoords="offset points", ha="center")
        if chosen:
            line(axes, [chosen], group, "o", color="black", label=f"router, threshold {chosen['threshold']:g}")
        axes.set(title=group, xlabel="MMACs per image")
        axes.margins(x=0.1, y=0.2)
    grid[0][0].set_ylabel("test accuracy (%)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def _panels(rows: int, columns: int, width: float, row_height: float, **grid: Any) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns]."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install matplotlib.") from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, rows * row_height + 0.4), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def _legend_below(axes: Any) -> None:
    place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
    axes.legend(**place, frameon=False, fontsize="small", columnspacing=1, handlelength=1.2)


def _colour(expert: int) -> str:
    return _EXPERTS[expert % len(_EXPERTS)]


def _heights(values: Sequence[float | None]) -> list[float]:
    return [value or 0 for value in values]


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))

"""Plots of a run or a release, from its metrics; they need matplotlib.

curves.png: loss and accuracy by epoch. long_tail.png: training images and accuracy of the classes from head to tail.
reliability.png: accuracy by confidence. experts.png: the experts alone, how they differ, how many a router uses.
confusions.png: misclassified images. routing.png: accuracy against MACs. Shot groups have the same colours in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..data.image_set import ImageSet, LongTailData
from . import figures
from .confusion_plots import plot_confusion_gallery
from .figures import COLOURS, TITLES
from .tables import GROUPS, STAGE_NAMES, number, short_threshold

Rows = dict[str, dict[str, Any]]  # metrics of `compute_metrics` by name, such as "ensemble" and "routed"

_MODELS = (COLOURS["all"], "#a0a0a0", "#c8c8c8")  # of the rows, where experts have colours of their own


def plot_run(
    folder: Path,
    history: list[dict[str, Any]],
    results: dict[str, Any],
    data: LongTailData,
    shots: tuple[int, int],
) -> None:
    """Draw curves.png and the plots of a run's results; nothing without matplotlib.

    The gallery is of the last stage, and needs images that can be read one by one, which a stream does not have.
    """
    if find_spec("matplotlib") is None:
        return
    if history:  # not of heads that are re-balanced in closed form
        plot_curves(folder / "curves.png", history)
    rows = {STAGE_NAMES[stage]: metrics for stage, metrics in results["stages"].items()}
    classes = (results["class_counts"], data.class_names, shots)
    plot_metrics(folder, rows, *classes)
    if isinstance(data.test, ImageSet) and isinstance(data.train, ImageSet):
        plot_confusion_gallery(folder / "confusions.png", [*rows.values()][-1], *classes, data.test, data.train)


def plot_metrics(
    folder: Path, rows: Rows, class_counts: Sequence[int], class_names: Sequence[str], shots: tuple[int, int]
) -> None:
    """Draw long_tail.png, reliability.png and experts.png."""
    plot_long_tail(folder / "long_tail.png", rows, class_counts, class_names, shots)
    plot_reliability(folder / "reliability.png", rows)
    plot_experts(folder / "experts.png", rows)


def plot_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Draw training loss and test accuracy by epoch, one line of panels per stage."""
    titles = {"experts": "Stage one, experts", "heads": "Re-balanced heads", "router": "Stage two, router"}
    stages = [stage for stage in titles if any(row["stage"] == stage for row in history)]
    figure, grid = figures.panels(len(stages), 2, 9, 2.8, sharex="row")
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
    figures.save(figure, path)


def plot_long_tail(
    path: Path, rows: Rows, class_counts: Sequence[int], class_names: Sequence[str], shots: tuple[int, int]
) -> None:
    """Draw training images and test accuracy of every class, from head to tail.

    class_counts [C] and class_names [C]; shots: thresholds of `priors.shot_groups`, those of the metrics in rows. Above
    100 classes, a bar is the mean of neighbouring ones; a black line is the mean of a shot group.
    """
    counts = np.asarray(class_counts)
    order, runs = figures.head_to_tail(class_counts, shots)
    figure, grid = figures.panels(1 + len(rows), 1, 8, 2, sharex=True)
    panels = [line[0] for line in grid]
    bars = dict(
        x=[run.centre for run in runs],
        width=[(run.stop - run.start) * (0.8 if len(order) <= 40 else 1) for run in runs],
        color=[COLOURS[run.group] for run in runs],
    )
    panels[0].bar(height=[counts[order[run.start : run.stop]].mean() for run in runs], **bars)
    panels[0].set(title="Training images per class", yscale="log", ylabel="images")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(figures.plain_numbers())
    for axes, (name, metrics) in zip(panels[1:], rows.items(), strict=True):
        accuracies = np.asarray(metrics["per_class"], dtype=float)[order]  # NaN: no test image
        axes.bar(height=[_mean(accuracies[run.start : run.stop]) for run in runs], **bars)
        for group in GROUPS[1:]:
            own = [run for run in runs if run.group == group]
            if own:
                first, last = own[0].start, own[-1].stop
                mean = _mean(accuracies[first:last])
                axes.plot([first - 0.5, last - 0.5], [mean, mean], color="black", linewidth=1)
        groups = ", ".join(f"{group} {number(metrics[group], 1)}" for group in GROUPS)
        axes.set(title=f"Test accuracy, {name} ({groups})", ylabel="accuracy (%)", ylim=(0, 100))
    for group in (group for group in GROUPS[1:] if any(group == run.group for run in runs)):
        panels[0].bar(0, 0, color=COLOURS[group], label=f"{group}-shot")
    panels[0].plot([], [], color="black", linewidth=1, label="mean of the group")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=4)
    if len(order) <= 20:
        panels[-1].set_xticks(
            [run.centre for run in runs], [figures.label(class_names[c]) for c in order], rotation=30, ha="right"
        )
    merged = "" if len(runs) == len(order) else "; a bar is the mean of neighbouring classes"
    panels[-1].set_xlabel(f"classes, from most to fewest training images{merged}")
    figures.save(figure, path)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def plot_reliability(path: Path, rows: Rows) -> None:
    """Draw reliability diagrams by shot group, below histograms of confidence."""
    figure, grid = figures.panels(2 * len(rows), len(GROUPS), 11, 1.7, height_ratios=[1, 2.5] * len(rows), sharex=True)
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
    figures.save(figure, path)


def plot_experts(path: Path, rows: Rows) -> None:
    """Draw accuracy of the experts by shot group, how many are used, and how they differ.

    Disagreement and diversity as in `metrics.expert_metrics`; what was not measured has no panel.
    """
    experts = next((metrics for metrics in reversed(rows.values()) if "experts" in metrics), None)
    several = experts is not None and len(experts["experts"]["accuracy"]["all"]) > 1
    routed = {name: metrics for name, metrics in rows.items() if "experts_used_by_group" in metrics}
    count = 1 + len(routed) + 2 * several
    lines = 1 + (count > 2)
    figure, grid = figures.panels(lines, -(-count // lines), 11 if count > 1 else 6, 3.3)
    panels = iter(grid.flat)
    _plot_accuracies(next(panels), rows, experts)
    for name, metrics in routed.items():
        _plot_experts_used(next(panels), name, metrics["experts_used_by_group"])
    if experts is not None and several:
        colours = [COLOURS[group] for group in GROUPS]
        disagreement, diversity = (experts["experts"][key] for key in ("disagreement", "diversity"))
        middle, right = next(panels), next(panels)
        middle.bar(GROUPS, [100 * value for value in _heights(disagreement.values())], color=colours)
        middle.set(title="Disagreement of two experts", ylabel="test images (%)", ylim=(0, 100))
        right.bar(GROUPS, _heights(diversity.values()), color=colours)
        right.set(title="Diversity of the experts", ylabel="KL(ensemble || expert) in nats")
    for axes in panels:
        axes.set_axis_off()
    figures.save(figure, path)


def _plot_accuracies(axes: Any, rows: Rows, experts: dict[str, Any] | None) -> None:
    bars = [
        (name, _MODELS[k % 3], [metrics[group] for group in GROUPS]) for k, (name, metrics) in enumerate(rows.items())
    ]
    if experts is not None:
        by_group = experts["experts"]["accuracy"]
        numbers = experts.get("members", range(1, 1 + len(by_group["all"])))
        alone = zip(*(by_group[group] for group in GROUPS), strict=True)
        bars += [
            (f"expert {i}", figures.expert_colour(k), [*own])
            for k, (i, own) in enumerate(zip(numbers, alone, strict=True))
        ]
    width = 0.8 / len(bars)
    for i, (label, colour, heights) in enumerate(bars):
        places = [group + (i + 0.5) * width - 0.4 for group in range(len(GROUPS))]
        container = axes.bar(places, _heights(heights), width, color=colour, label=label)
        axes.bar_label(container, fmt="%.0f", fontsize=7)
    axes.set(title="Test accuracy", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_xticks(range(len(GROUPS)), GROUPS)
    figures.legend_below(axes)


def _plot_experts_used(axes: Any, name: str, used: dict[str, Any]) -> None:
    fractions = 100 * np.array([used[group] or [0] * len(used["all"]) for group in GROUPS])
    for i, own in enumerate(fractions.T):
        label = f"{i + 1} expert{'s' * (i > 0)}"
        axes.bar(GROUPS, own, color=figures.expert_colour(i), bottom=fractions[:, :i].sum(1), label=label)
    axes.set(title=f"Number of experts used, {name}", ylabel="test images (%)", ylim=(0, 100))
    figures.legend_below(axes)


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
    figure, grid = figures.panels(1, len(groups), 2.9 * len(groups), 3.3, "Accuracy against computation")

    def line(axes: Any, points: list[dict[str, Any]], group: str, *style: str, **more: Any) -> None:
        axes.plot([point["macs"] / 1e6 for point in points], [point[group] for point in points], *style, **more)

    for axes, group in zip(grid[0], groups, strict=True):
        line(axes, prefixes, group, "s--", color="#9aa0a6", linewidth=1, label="1, 2, … experts for every image")
        line(axes, curve, group, color=COLOURS[group], label="router, best thresholds")
        for i, point in enumerate(prefixes):
            at = (point["macs"] / 1e6, point[group])
            axes.annotate(str(i + 1), at, (0, -13), textcoords="offset points", ha="center")
        if chosen:
            label = f"router, threshold {short_threshold(chosen['threshold'])}"
            line(axes, [chosen], group, "o", color="black", label=label)
        axes.set(title=TITLES[group], xlabel="MMACs per image")
        axes.margins(x=0.1, y=0.2)
    grid[0][0].set_ylabel("test accuracy (%)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figures.save(figure, path)


def _heights(values: Iterable[float | None]) -> list[float]:
    """Heights of bars; NaN, which has none and no label, for a group without images."""
    return [np.nan if value is None else value for value in values]

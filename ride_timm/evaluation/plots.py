"""Pictures of a run, drawn from its own figures; they need matplotlib (the `plot` extra)."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .tables import GROUPS, STAGE_NAMES


def plot_run(folder: Path, history: list[dict[str, Any]], results: dict[str, Any]) -> list[Path]:
    """Draw curves.png (loss and test accuracy by epoch), classes.png (accuracy by class, most frequent first), and what
    `plot_measures` draws.

    Gives the files written; none where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    rows = [row for row in history if row["stage"] == "experts"]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] for row in rows], [row["loss"] for row in rows])
    left.set(xlabel="epoch", ylabel="training loss")
    tested = [row for row in rows if row["all"] is not None]
    for group in GROUPS:
        right.plot([row["epoch"] for row in tested], [row[group] for row in tested], marker=".", label=group)
    right.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 100))
    right.legend()
    written = [folder / "curves.png"]
    write_atomically(written[0], lambda partial: figure.savefig(partial, dpi=120, format="png"))

    counts = results["class_counts"]
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for stage, metrics in results["stages"].items():
        axes.plot([metrics["per_class"][c] for c in order], ".", label=STAGE_NAMES[stage], alpha=0.7)
    axes.set(xlabel="class, from most to fewest training images", ylabel="test accuracy (%)", ylim=(0, 100))
    images = axes.twinx()
    images.fill_between(range(len(order)), [counts[c] for c in order], alpha=0.15, color="grey", step="mid")
    images.set(yscale="log", ylabel="training images (grey)")
    axes.legend()
    written.append(folder / "classes.png")
    write_atomically(written[1], lambda partial: figure.savefig(partial, dpi=120, format="png"))
    return written + plot_measures(
        folder, {STAGE_NAMES[stage]: metrics for stage, metrics in results["stages"].items()}
    )


def plot_measures(folder: Path, rows: dict[str, dict[str, Any]]) -> list[Path]:
    """Draw head_to_tail.png (accuracy by runs of classes), reliability.png (accuracy by confidence, by shot group) and
    experts.png (each expert alone and how they differ, or how many are used, by shot group).

    rows: what `metrics.Accuracy.compute` gives, by name; gives the files written.
    """
    figures = {"head_to_tail.png": _head_to_tail(rows), "reliability.png": _reliability(rows)}
    figures["experts.png"] = _experts(rows)
    written = {folder / name: figure for name, figure in figures.items()}
    for path, figure in written.items():
        write_atomically(path, lambda partial, figure=figure: figure.savefig(partial, dpi=120, format="png"))
    return list(written)


def _head_to_tail(rows: dict[str, dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    curve: list[dict[str, Any]] = []
    for name, metrics in rows.items():
        curve = metrics["head_to_tail"]
        edges = [0, *accumulate(row["classes"] for row in curve)]
        middles = [(start + stop) / 2 for start, stop in pairwise(edges)]
        # a run of untested classes is a gap in the line
        heights = [float("nan") if row["accuracy"] is None else row["accuracy"] for row in curve]
        axes.plot(middles, heights, marker="o", label=name)
    axes.set(xlabel="classes, from most to fewest training images", ylabel="accuracy, mean of the classes (%)")
    axes.set(ylim=(0, 100), xlim=(0, edges[-1]))
    images = axes.twinx()
    images.stairs([row["train_images"] for row in curve], edges, fill=True, alpha=0.15, color="grey")
    images.set(yscale="log", ylabel="training images a class (grey)")
    axes.legend()
    return figure


def _reliability(rows: dict[str, dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3 * len(rows) + 0.7), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False, sharex=True, sharey=True)
    for line, (name, metrics) in zip(grid, rows.items(), strict=True):
        for axes, (group, bins) in zip(line, metrics["reliability"].items(), strict=True):
            edges = [100 * i / len(bins) for i in range(len(bins) + 1)]
            total = max(1, sum(row["images"] for row in bins))
            axes.stairs([row["accuracy"] or 0 for row in bins], edges, fill=True, alpha=0.7, label="accuracy")
            shares = [100 * row["images"] / total for row in bins]
            axes.stairs(shares, edges, color="black", label="share of the images")
            axes.plot([0, 100], [0, 100], "--", color="grey", label="calibrated")
            ece = metrics["calibration"][group]["ece"]
            note = "no images" if ece is None else f"ECE {ece:.1f}"
            axes.set(title=f"{name}, {group}: {note}", xlim=(0, 100), ylim=(0, 100))
        line[0].set_ylabel("%")
    for axes in grid[-1]:
        axes.set_xlabel("confidence (%)")
    # below, where it hides no bar
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _experts(rows: dict[str, dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (name, metrics) in zip(grid, rows.items(), strict=True):
        groups = list(metrics["class_means"])
        places = range(len(groups))
        bars = {name: [metrics[group] or 0 for group in groups]}
        experts, used = metrics.get("experts"), metrics.get("experts_used_by_group")
        if experts:
            alone = list(zip(*(experts["accuracy"][group] for group in groups), strict=True))
            numbers = metrics.get("members", range(len(alone)))
            bars |= {f"expert {i}": [value or 0 for value in own] for i, own in zip(numbers, alone, strict=True)}
        if experts and len(alone) > 1:  # one alone differs from none
            right.bar(places, [100 * (experts["disagreement"][group] or 0) for group in groups], width=0.4)
            right.set(ylabel="disagreement (%)", ylim=(0, 100))
            nats = right.twinx()
            nats.plot(places, [experts["diversity"][group] or 0 for group in groups], "D", color="black")
            nats.set(ylabel="diversity (nats, black)")
            nats.set_ylim(bottom=0)
        elif used:
            shares = [[100 * share for share in used[group] or [0] * len(used["all"])] for group in groups]
            for i, own in enumerate(zip(*shares, strict=True)):
                below = [sum(of_group[:i]) for of_group in shares]
                right.bar(places, own, width=0.6, bottom=below, label=f"{i + 1} used")
            right.set(ylabel="share of the images (%)", ylim=(0, 100))
            right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            right.set_axis_off()
        width = 0.8 / len(bars)
        for i, (label, heights) in enumerate(bars.items()):
            left.bar([place + (i + 0.5) * width - 0.4 for place in places], heights, width, label=label)
        left.set(ylabel="accuracy (%)", ylim=(0, 100))
        left.legend(loc="center right", bbox_to_anchor=(-0.15, 0.5))
        for axes in (left, right):
            axes.set_xticks(places, groups)
    return figure


def plot_curve(path: Path, curve: list[dict[str, Any]], prefixes: list[dict[str, Any]]) -> None:
    """Draw accuracy against MACs: routing by its thresholds, and 1, 2, … experts always as single points (a PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for group in GROUPS:
        if curve[0][group] is None:
            continue
        (line,) = axes.plot([p["macs"] / 1e6 for p in curve], [p[group] for p in curve], label=f"{group}, routed")
        points = [p["macs"] / 1e6 for p in prefixes], [p[group] for p in prefixes]
        axes.plot(*points, "o", color=line.get_color(), label="1, 2, … experts always" if group == "all" else None)
    axes.set(xlabel="MACs an image, millions", ylabel="accuracy (%)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside, where it hides no point
    figure.savefig(path, dpi=120, format="png")

"""Pictures of a run, drawn from its own figures; they need matplotlib (the `plot` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import write_atomically


def plot_run(folder: Path, history: list[dict[str, Any]], results: dict[str, Any]) -> list[Path]:
    """Draw curves.png (loss and test accuracy by epoch) and classes.png (accuracy by class, most frequent first).

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
    for group in ("all", "many", "medium", "few"):
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
        label = {"experts": "ensemble", "router": "routed"}[stage]
        axes.plot([metrics["per_class"][c] for c in order], ".", label=label, alpha=0.7)
    axes.set(xlabel="class, from most to fewest training images", ylabel="test accuracy (%)", ylim=(0, 100))
    images = axes.twinx()
    images.fill_between(range(len(order)), [counts[c] for c in order], alpha=0.15, color="grey", step="mid")
    images.set(yscale="log", ylabel="training images (grey)")
    axes.legend()
    written.append(folder / "classes.png")
    write_atomically(written[1], lambda partial: figure.savefig(partial, dpi=120, format="png"))
    return written


def plot_curve(path: Path, curve: list[dict[str, Any]], prefixes: list[dict[str, Any]]) -> None:
    """Draw accuracy against MACs: routing by its thresholds, and 1, 2, … experts always as single points (a PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for group in ("all", "many", "medium", "few"):
        if curve[0][group] is None:
            continue
        (line,) = axes.plot([p["macs"] / 1e6 for p in curve], [p[group] for p in curve], label=f"{group}, routed")
        points = [p["macs"] / 1e6 for p in prefixes], [p[group] for p in prefixes]
        axes.plot(*points, "o", color=line.get_color(), label="1, 2, … experts always" if group == "all" else None)
    axes.set(xlabel="MACs an image, millions", ylabel="accuracy (%)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside, where it hides no point
    figure.savefig(path, dpi=120, format="png")

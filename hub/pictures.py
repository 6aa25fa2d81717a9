"""The pictures of a card, drawn from results.json alone (they need matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ride_timm import InputError
from ride_timm.files import write_atomically
from ride_timm.priors import shot_groups

_COLOURS = {"many": "#3b6ea8", "medium": "#e0993e", "few": "#b8433a"}


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the pictures of a card need matplotlib: pip install matplotlib.") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_classes(path: Path, results: dict[str, Any], class_names: list[str], shots: tuple[int, int]) -> None:
    """Test accuracy by class, from most to fewest training images, which stand above as a curve of their own.

    shots: thresholds of `priors.shot_groups`, those of the figures in results.
    """
    counts, per_class = results["class_counts"], results["stages"]["experts"]["per_class"]
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    group = {c: name for name, mask in shot_groups(counts, *shots).items() for c in mask.nonzero().flatten().tolist()}
    figure = _figure(8, 4.6)
    images, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
    places = range(len(order))
    images.bar(places, [counts[c] for c in order], color="#c8ccd0", width=1)
    images.set(yscale="log", ylabel="training\nimages")
    colours = [_COLOURS[group[c]] for c in order]
    axes.bar(places, [per_class[c] or 0 for c in order], color=colours, width=0.8 if len(order) <= 40 else 1)
    for name, colour in _COLOURS.items():
        members = [c for c in order if group[c] == name]
        if members:
            mean = results["stages"]["experts"][name]
            first, last = order.index(members[0]) - 0.45, order.index(members[-1]) + 0.45
            axes.plot([first, last], [mean, mean], color="black", linewidth=1.2)
            axes.bar(0, 0, color=colour, label=f"{name}-shot, {mean:.1f} % together" if mean is not None else name)
    axes.set(ylabel="test accuracy (%)", ylim=(0, 100))
    if len(order) <= 20:
        axes.set_xticks(places, [class_names[c] for c in order], rotation=30, ha="right")
    else:
        axes.set_xlabel("classes, from most to fewest training images")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
        images.spines[side].set_visible(False)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def draw_routing(path: Path, routing: dict[str, Any], routed: dict[str, Any]) -> None:
    """Accuracy against cost: every threshold of the router, 1, 2, … experts for every image, and the one released."""
    figure = _figure(8, 3.8)
    axes = figure.subplots()
    curve, prefixes = routing["curve"], routing["prefixes"]

    def line(points: list[dict[str, Any]], *style: str, **kwargs: Any) -> None:
        axes.plot([p["macs"] / 1e6 for p in points], [p["all"] for p in points], *style, **kwargs)

    line(curve, color="#3b6ea8", label="router, any threshold")
    line(prefixes, "s--", color="#9aa0a6", linewidth=1, label="the first 1, 2, … experts, always")
    for i, point in enumerate(prefixes):
        at = (point["macs"] / 1e6, point["all"])
        axes.annotate(str(i + 1), at, (0, -14), textcoords="offset points", ha="center")
    label = f"threshold {routed['threshold']:g}, as released"
    axes.plot(routed["macs"] / 1e6, routed["all"], "o", color="#b8433a", markersize=8, label=label)
    axes.set(xlabel="MACs an image, millions", ylabel="test accuracy, all classes (%)")
    axes.margins(x=0.06, y=0.16)
    axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))

"""Draw docs/ride.svg: trunk, experts and gates, and accuracy against MACs of a staged release.

python docs/figure.py [--png FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

ROOT = Path(__file__).parent.parent
RELEASE = ROOT / "hub" / "ride_resnet32.cifar100_lt100_mutual"
PICTURE = ROOT / "docs" / "ride.svg"
INK, GREY, LINE = "#1f2933", "#66727f", "#9aa5b1"
TRUNK, EXPERT, GATE = ("#e6eaef", "#7b8794"), ("#dbe8f6", "#3b6ea8"), ("#fdebd3", "#d9822b")  # fill, edge
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "svg.fonttype": "path",  # the same letters in every browser
    "svg.hashsalt": "ride",
}


def read_results() -> dict[str, Any]:
    return json.loads((RELEASE / "results.json").read_text(encoding="utf-8"))


def description(results: dict[str, Any]) -> str:
    """The numbers in the picture, as its text alternative."""
    router = results["stages"]["router"]
    stops = " / ".join(f"{100 * fraction:.0f}" for fraction in router["experts_used"])
    return (
        f"{RELEASE.name}: routed {router['all']:.1f} % at {router['macs'] / 1e6:.1f} MMACs, "
        f"{stops} % of the images stop after expert 1 / 2 / 3"
    )


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colours: tuple[str, str]) -> None:
    """A rounded box around the centre (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=1.6"
    fill, edge = colours
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.3))
    axes.text(x, y, text, ha="center", va="center", linespacing=1.35)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY, **kwargs: Any) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.3, shrinkA=0,
                        shrinkB=0, **kwargs)
    )  # fmt: skip


def draw_network(axes: Axes, results: dict[str, Any]) -> None:
    """Experts from top to bottom, a gate between each two."""
    axes.set(xlim=(0, 100), ylim=(0, 60), aspect="equal")
    axes.axis("off")
    rows, gates = (52, 30, 8), (41, 19)
    stops = [100 * fraction for fraction in results["stages"]["router"]["experts_used"]]
    _box(axes, 6, 30, 11, 9.6, "image", ("white", TRUNK[1]))
    _box(axes, 25, 30, 15, 53.6, "shared\ntrunk", TRUNK)
    _box(axes, 86, 30, 17, 53.6, "mean of\nthe logits\nso far\n\n= prediction", TRUNK)
    _arrow(axes, (11.5, 30), (17.5, 30))
    for i, y in enumerate(rows):
        _box(axes, 51, y, 21, 9.6, f"expert {i + 1}", EXPERT)
        _arrow(axes, (32.5, y), (40.5, y))
        _arrow(axes, (61.5, y), (77.5, y), EXPERT[1])
        axes.text(69, y + 1.4, "logits", ha="center", va="bottom", color=EXPERT[1], size=9)
    for i, y in enumerate(gates):
        corners = [(51, y + 3.4), (59.5, y), (51, y - 3.4), (42.5, y)]
        axes.add_patch(Polygon(corners, facecolor=GATE[0], edgecolor=GATE[1], linewidth=1.3, joinstyle="round"))
        axes.text(51, y, f"gate {i + 1}", ha="center", va="center", size=9)
        _arrow(axes, (51, rows[i] - 4.8), (51, y + 3.4), GATE[1])
        _arrow(axes, (51, y - 3.4), (51, rows[i + 1] + 4.8), GATE[1])
        _arrow(axes, (59.5, y), (77.5, y), GATE[1], linestyle=(0, (3, 2)))
        axes.text(68.5, y + 1.2, f"stop: {stops[i]:.0f} %", ha="center", va="bottom", color=GATE[1], size=9)


def draw_curve(axes: Axes, results: dict[str, Any]) -> None:
    """Test accuracy against MACs: the Pareto front of the thresholds, and 1, 2, … experts for every image."""
    routed, routing = results["stages"]["router"], results["routing"]

    def points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
        return [row["macs"] / 1e6 for row in rows], [row["all"] for row in rows]

    fixed = points(routing["prefixes"])
    axes.plot(*fixed, "--", color=EXPERT[1], linewidth=1, alpha=0.6)
    axes.plot(*fixed, "s", color=EXPERT[1], markersize=7, label="the same experts for every image")
    axes.plot(*points(routing["curve"]), color=GATE[1], linewidth=2.4, label="routed, best thresholds")
    x, y = routed["macs"] / 1e6, routed["all"]
    axes.plot(x, y, "o", color=GATE[1], markersize=9, markeredgecolor="white", markeredgewidth=1.5)
    for i, (macs, accuracy) in enumerate(zip(*fixed, strict=True)):
        name = "1 expert" if i == 0 else f"{i + 1} experts"
        last = i == len(fixed[0]) - 1
        axes.annotate(f"{name}\n{accuracy:.1f}", (macs, accuracy), (0 if last else 9, -12 if last else -3), va="top",
                      ha="center" if last else "left", textcoords="offset points", color=EXPERT[1], size=9)  # fmt: skip
    fraction = routed["macs"] / results["stages"]["experts"]["macs"]
    axes.annotate(f"routed {y:.1f}\n{100 * fraction:.0f} % of the MACs", (x, y), (-12, 7), ha="right", va="bottom",
                  textcoords="offset points", color=GATE[1], size=9, weight="bold")  # fmt: skip
    drawn = axes.dataLim
    bottom, top = math.floor(drawn.ymin) - 1, drawn.ymax + 0.5  # room for the legend
    axes.set(xlabel="MMACs per image", xlim=(drawn.xmin - 20, drawn.xmax + 9), ylim=(bottom, top))
    axes.set_yticks(range(bottom, math.floor(top) + 1))
    axes.grid(axis="y", color="#eef1f4", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.legend(frameon=False, loc="lower right", fontsize=9, handlelength=1.6)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw(path: Path, results: dict[str, Any]) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.3), facecolor="white")
        network = figure.add_axes((0.015, 0.02, 0.53, 0.88))
        curve = figure.add_axes((0.605, 0.14, 0.38, 0.755))
        draw_network(network, results)
        draw_curve(curve, results)
        title = dict(size=11.5, weight="bold", ha="left", va="center")
        figure.text(0.022, 0.95, "RIDE: an expert runs only on the images that need it", **title)
        figure.text(0.577, 0.95, "CIFAR100-LT, ResNet-32: test accuracy in percent", **title)
        picture = dict(Description=description(results), Date=None) if path.suffix == ".svg" else None
        figure.savefig(path, metadata=picture, dpi=160)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--png", type=Path, metavar="FILE", help="draw this PNG as well, to look at")
    args = flags.parse_args()
    for path in filter(None, (PICTURE, args.png)):
        draw(path, read_results())


if __name__ == "__main__":
    main()

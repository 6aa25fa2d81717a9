"""Plots of confusions: the matrix from head to tail, and a gallery of misclassified images; they need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from ..data.image_set import ImageSet
from ..errors import RunError
from ..priors import shot_groups
from . import figures
from .confusions import NUM_EXAMPLES, confusion_matrix, largest_confusions, write_confusion_matrix
from .counts import Counts
from .figures import COLOURS
from .metrics import write_class_metrics
from .tables import GROUPS, number

_NUM_BARS, _NUM_ROWS = 20, 8
_MAX_NAMES = 20  # classes; above, names do not fit beside a matrix


def write_confusions(
    folder: Path, counts: Counts, class_counts: Sequence[int], class_names: Sequence[str], shots: tuple[int, int]
) -> None:
    """Write confusion_matrix.csv and classes.csv, in the order of the classes, and with matplotlib a picture."""
    write_class_metrics(folder / "classes.csv", counts, class_counts, class_names)
    matrix = confusion_matrix(counts.targets, counts.predictions, len(class_names))
    write_confusion_matrix(folder / "confusion_matrix.csv", matrix, class_names)
    if find_spec("matplotlib") is not None:
        plot_confusion_matrix(folder / "confusion_matrix.png", counts, class_counts, class_names, shots)


def plot_confusion_matrix(
    path: Path, counts: Counts, class_counts: Sequence[int], class_names: Sequence[str], shots: tuple[int, int]
) -> None:
    """Draw the largest confusions as bars, and the confusion matrix from head to tail.

    class_counts [C] of the training set; above 100 classes a cell of the matrix is of neighbouring classes.
    """
    figure, grid = figures.panels(1, 2, 14, 6.2, width_ratios=[1, 1.25])
    left, right = grid[0]
    group_of = _groups_of(class_counts, shots)
    largest = largest_confusions(counts, _NUM_BARS)
    bars = left.barh(
        range(len(largest)),
        [row["images"] for row in largest],
        color=[COLOURS[group_of[row["true"]]] for row in largest],
    )
    drawn = [figures.label(name) for name in class_names]
    left.set_yticks(range(len(largest)), [f"{drawn[row['true']]} → {drawn[row['predicted']]}" for row in largest])
    left.bar_label(bars, [f" {row['percent']:.0f} %" for row in largest], fontsize="small")
    left.invert_yaxis()
    left.grid(axis="x")
    left.grid(visible=False, axis="y")
    left.margins(x=0.12, y=0.01)
    left.tick_params(axis="y", labelsize="small")
    left.set(title="Largest confusions, true → predicted", xlabel="test images, and percent of the true class")
    for group in GROUPS[1:]:
        left.barh(0, 0, color=COLOURS[group], label=f"{group}-shot class")
    figures.legend_below(left)

    order, runs = figures.head_to_tail(class_counts, shots)
    run_of = np.empty(len(order), dtype=np.int64)
    for i, run in enumerate(runs):
        run_of[order[run.start : run.stop]] = i
    cells = confusion_matrix(run_of[counts.targets], run_of[counts.predictions], len(runs))
    percent = 100 * cells / np.maximum(cells.sum(1, keepdims=True), 1)
    edges = [run.start - 0.5 for run in runs] + [len(order) - 0.5]
    from matplotlib.colors import PowerNorm

    mesh = right.pcolormesh(edges, edges, percent, cmap="Greys", norm=PowerNorm(0.5, 0, 100))
    figure.colorbar(mesh, ax=right, label="test images of the true class (%)", ticks=[0, 1, 5, 10, 25, 50, 100])
    right.set_aspect("equal")
    right.invert_yaxis()
    right.grid(visible=False)
    right.spines[:].set_visible(False)
    for group in GROUPS[1:]:  # a bar of the group's colour along both axes
        own = [run for run in runs if run.group == group]
        if own:
            ends, beside = [own[0].start - 0.5, own[-1].stop - 0.5], [-0.008, -0.008]  # a fraction of the axis
            edge = dict(color=COLOURS[group], linewidth=5, clip_on=False, solid_capstyle="butt")
            right.plot(ends, beside, transform=right.get_xaxis_transform(), **edge)
            right.plot(beside, ends, transform=right.get_yaxis_transform(), **edge)
    if len(order) <= _MAX_NAMES:
        names = [drawn[c] for c in order]
        right.set_xticks(range(len(order)), names, rotation=45, ha="right")
        right.set_yticks(range(len(order)), names)
        for i, j in zip(*np.nonzero(cells), strict=True):
            colour = "white" if percent[i, j] > 25 else "black"
            right.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour, fontsize="small")
    merged = "" if len(runs) == len(order) else ", neighbouring classes merged"
    right.set(title="Confusion matrix from most to fewest training images", xlabel=f"predicted class{merged}")
    right.set_ylabel(f"true class{merged}")
    figures.save(figure, path)


def plot_confusion_gallery(
    path: Path,
    metrics: Mapping[str, Any],
    class_counts: Sequence[int],
    class_names: Sequence[str],
    shots: tuple[int, int],
    test: ImageSet,
    train: ImageSet,
) -> None:
    """Draw misclassified test images next to training images of the predicted class.

    A row for each of the largest confusions in the metrics. Draws nothing without a confusion.
    """
    confusions = metrics["confusions"][:_NUM_ROWS]
    if not confusions:
        return
    examples = [1] * NUM_EXAMPLES
    widths = [1.7, *examples, 0.2, *examples]  # names, test images, a gap, training images
    figure, grid = figures.panels(len(confusions), len(widths), 12, 1.35, "Largest confusions\n", width_ratios=widths)
    group_of = _groups_of(class_counts, shots)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, confusion in zip(grid, confusions, strict=True):
        true, predicted = confusion["true"], confusion["predicted"]
        for y, c, arrow in ((0.78, true, ""), (0.52, predicted, "→ ")):
            line[0].text(0, y, arrow + figures.label(class_names[c]), color=COLOURS[group_of[c]], weight="bold")
        images = f"{confusion['images']} image{'s' * (confusion['images'] > 1)}"
        caption = f"{images}, {number(confusion['percent'], 1)} %\nof the true class"
        line[0].text(0, 0.1, caption, fontsize="small")
        for axes, example in zip(line[1:], confusion["examples"], strict=False):
            _show(axes, test, example["image"])
            axes.set_title(f"{100 * example['probability']:.0f} %", fontsize=8)
        learned = np.flatnonzero(train.labels == predicted)[:NUM_EXAMPLES]
        for axes, position in zip(line[-NUM_EXAMPLES:], learned.tolist(), strict=False):
            _show(axes, train, position)
    above = dict(xytext=(0, 20), xycoords="axes fraction", textcoords="offset points", fontsize=10)
    headings = {1: "misclassified test images, with the probability of the prediction"}
    headings[len(widths) - NUM_EXAMPLES] = "training images of the predicted class"
    for column, heading in headings.items():  # wider than the column, which must not grow with them
        grid[0][column].annotate(heading, (0, 1), **above).set_in_layout(False)
    figures.save(figure, path)


def _show(axes: Any, images: ImageSet, position: int) -> None:
    try:
        image = images[position][0]
    except RunError:  # a picture is no reason to end a run
        return
    size = min(160, *image.size)
    axes.imshow(ImageOps.fit(image, (size, size)))


def _groups_of(class_counts: Sequence[int], shots: tuple[int, int]) -> list[str]:
    """The shot group of each class, [C]."""
    groups = shot_groups(class_counts, *shots)
    return [next(name for name, mask in groups.items() if mask[c]) for c in range(len(class_counts))]

"""Style of all plots: panels, colours of shot groups and experts, classes from head to tail; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..files import write_atomically
from .metrics import group_masks
from .tables import GROUPS

COLOURS = {"all": "#4d4d4d", "many": "#3b6ea8", "medium": "#e0993e", "few": "#b8433a"}
TITLES = {"all": "all classes"} | {group: f"{group}-shot classes" for group in GROUPS[1:]}
MAX_RUNS = 100  # above so many classes, neighbouring ones are drawn as one
_EXPERTS = ("#0b525b", "#2a9d8f", "#8ac9b8", "#c9e4db", "#8d7bb8", "#c3b9dd")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 11,
}


class Run(NamedTuple):
    """Neighbouring classes of one shot group, start … stop-1 in the order from head to tail."""

    start: int
    stop: int
    group: str

    @property
    def centre(self) -> float:
        return (self.start + self.stop - 1) / 2


def head_to_tail(class_counts: Sequence[int], shots: tuple[int, int]) -> tuple[np.ndarray, list[Run]]:
    """Classes from most to fewest training images [C], and runs of them within a shot group.

    A run is one class where there are at most `MAX_RUNS`.
    """
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    groups = group_masks(class_counts, len(order), shots)
    runs, start = [], 0
    for group in GROUPS[1:]:
        size = int(groups[group].sum())
        parts = size if len(order) <= MAX_RUNS else -(-size * MAX_RUNS // len(order))
        edges = start + np.linspace(0, size, parts + 1).round().astype(int) if size else []
        runs += [Run(int(first), int(last), group) for first, last in pairwise(edges)]
        start += size
    return order, runs


def panels(rows: int, columns: int, width: float, row_height: float, title: str = "", **grid: Any) -> tuple[Any, Any]:
    """A figure, of a size in inches, and its axes [rows, columns]."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install matplotlib.") from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, rows * row_height + 0.4), layout="constrained")
        if title:
            figure.suptitle(title)
        return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def label(class_name: str) -> str:
    """A class name as it is drawn: of at most 22 characters, without mathematics."""
    return (class_name if len(class_name) <= 22 else class_name[:21] + "…").replace("$", r"\$")


def plain_numbers() -> Any:
    """Minor tick labels of a logarithmic axis: 200, not 2 x 10^2."""
    from matplotlib.ticker import LogFormatter

    return LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.4))  # decades; since matplotlib 3.11, major ticks


def legend_below(axes: Any, **options: Any) -> None:
    place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=6)
    axes.legend(**place, frameon=False, fontsize="small", columnspacing=1, handlelength=1.2, **options)


def expert_colour(expert: int) -> str:
    """expert: index from 0."""
    return _EXPERTS[expert % len(_EXPERTS)]


def save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))

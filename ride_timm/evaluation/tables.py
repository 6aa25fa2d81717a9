"""Tables of metrics, and the names they share with plots and cards.

Experts are indexed from 0 in code and numbered from 1 wherever a person reads: flags, tables, plots, JSON, file names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GROUPS = ("all", "many", "medium", "few")
# stages of results.json by what their metrics are of
STAGE_NAMES = {"experts": "ensemble", "heads": "re-balanced", "router": "routed"}


def ensemble_metrics(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of all experts as a run leaves them, from its stages; {} where only a router was trained."""
    return stages.get("heads") or stages.get("experts") or {}


def number(value: float | None, digits: int = 2) -> str:
    """48.60; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def millions(count: float | None) -> str:
    """Parameters or MACs in millions: 102.2, or 6,131.4; a dash for None."""
    return "–" if count is None else f"{count / 1e6:,.1f}"


def short_threshold(value: float) -> str:
    """0.266986, or 1 - 5.96e-08 where six digits would say 1; Python reads both."""
    return f"{value:.6g}" if value == 1 or value < 1 - 1e-4 else f"1 - {1 - value:.3g}"


def percentages(fractions: Sequence[float] | None) -> str:
    """41.0 / 9.5 / 49.5 %; a dash for None and for an empty sequence."""
    return " / ".join(f"{100 * fraction:.1f}" for fraction in fractions) + " %" if fractions else "–"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns below a heading, the first column to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    rows = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first line its heading; no newline at the end."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def metrics_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A heading, and cells of accuracies (percent), MACs and experts used, by name."""
    lines = [["", *GROUPS, "top-5", "MMACs", "experts used"]]
    for name, metrics in rows.items():
        accuracies = (number(metrics.get(key)) for key in (*GROUPS, "top5"))
        lines.append([name, *accuracies, millions(metrics.get("macs")), percentages(metrics.get("experts_used"))])
    return lines


def metrics_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The same as a text table."""
    return text_table(metrics_rows(rows))


def groups_table(metrics: Mapping[str, Any]) -> str:
    """A text table of the metrics by shot group, and a line on the worst class.

    Accuracy over images and by class mean, confidence and expected calibration error in percent; of an ensemble, the
    accuracy of each expert, their disagreement (percent) and diversity (nats); of a router, the experts used.
    """
    experts, used = metrics.get("experts"), metrics.get("experts_used_by_group")
    heading = ["", "accuracy", "class mean", "confidence", "ECE"]
    if experts:
        numbers = metrics.get("members", range(1, 1 + len(experts["accuracy"]["all"])))
        heading += [*(f"expert {i}" for i in numbers), "disagreement", "diversity"]
    if used:
        heading += ["experts used"]
    lines = [heading]
    for group in GROUPS:
        calibration = metrics["calibration"][group]
        line = [metrics[group], metrics["class_means"][group], calibration["confidence"], calibration["ece"]]
        cells = [group, *map(number, line)]
        if experts:
            disagreement = experts["disagreement"][group]
            cells += [*map(number, experts["accuracy"][group])]
            cells += [number(None if disagreement is None else 100 * disagreement)]
            cells += [number(experts["diversity"][group], 3)]
        if used:
            cells += [percentages(used[group])]
        lines.append(cells)
    worst, harmonic = number(metrics["worst_class"]), number(metrics["harmonic_mean"])
    return f"{text_table(lines)}\nworst class {worst}, harmonic mean of the classes {harmonic}"


def classes_table(metrics: Mapping[str, Any]) -> str:
    """A text table of precision, recall and F1 in percent, means over classes and weighted by test images."""
    names = ("precision", "recall", "f1")
    means = {"mean of classes": "macro", "weighted by test images": "weighted"}
    lines = [[title, *(number(metrics[name][key]) for name in names)] for title, key in means.items()]
    return text_table([["", "precision", "recall", "F1"], *lines])


def confusions_table(metrics: Mapping[str, Any], class_names: Sequence[str]) -> str:
    """A text table of the largest confusions: class, predicted class, test images, percent of the class."""
    lines = [
        [f"{class_names[row['true']]} → {class_names[row['predicted']]}", str(row["images"]), number(row["percent"], 1)]
        for row in metrics["confusions"]
    ]
    return text_table([["largest confusions: true → predicted", "images", "% of the true class"], *lines])

"""Accuracy by class, by many / medium / few shot, and the share of samples that used each number of experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError, RunError
from .priors import shot_groups


class Accuracy:
    """Counts of right answers, kept as integers on the device: exact, in any order and over any number of processes.

    `num_experts` is for routed predictions, whose updates then name the number of experts used. Usage: `update` by
    batch, `reduce` once, `compute`. Each process counts its own samples, so no sample may be given to two of them.
    """

    def __init__(self, num_classes: int, num_experts: int | None = None, device: torch.device | str | None = None):
        self.num_classes = num_classes
        self.num_experts = num_experts
        # One row, one all_reduce: images by class, right by class, right within five, images by experts used.
        self._sizes = [num_classes, num_classes, 1, num_experts or 0]
        self._counts = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._reduced = False

    def update(self, logits: Tensor, targets: Tensor, experts_used: Tensor | None = None) -> None:
        """Counts a batch; top-5 is top-C where there are fewer than five classes.

        logits [B, C], targets [B], experts_used [B], from 1 to `num_experts`. InputError for logits of other classes,
        or experts_used given without `num_experts` or the reverse; RunError after `reduce`.
        """
        if self._reduced:
            raise RunError("these counts are summed over the processes already: start a new Accuracy")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise InputError(f"expected logits [B, {self.num_classes}], got shape {tuple(logits.shape)}")
        if (experts_used is None) != (self.num_experts is None):
            raise InputError("experts_used goes with num_experts: give both, for routed predictions, or neither")
        images, right, top5, used = self._counts.split(self._sizes)  # views
        hit = logits.argmax(1) == targets
        images.index_add_(0, targets, torch.ones_like(targets))
        right.index_add_(0, targets, hit.to(targets.dtype))
        top5 += (logits.topk(min(5, self.num_classes), dim=1).indices == targets[:, None]).sum()
        if experts_used is not None:
            used.index_add_(0, experts_used.long() - 1, torch.ones_like(targets))

    def reduce(self) -> "Accuracy":
        """Sums the counts over all processes, in place; a second call changes nothing."""
        if not self._reduced and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._counts)
        self._reduced = True
        return self

    def compute(self, class_counts: Sequence[int] | Tensor | None = None) -> dict[str, Any]:
        """Accuracies in percent, None where there is nothing to average.

        class_counts [C], training images of each class, or None where they are unknown -> {"all", "many", "medium",
        "few", "top5", "class_mean", "per_class": [C], and for routed predictions "experts_used": [E], fractions}. As
        the authors do, a group's accuracy is over its test images; "class_mean" weighs every class alike, for
        unbalanced test sets. InputError for counts of another number of classes.
        """
        images, right, top5, used = self._counts.cpu().split(self._sizes)
        if class_counts is not None and len(class_counts) != self.num_classes:
            raise InputError(f"expected {self.num_classes} class counts, got {len(class_counts)}")
        everyone = torch.ones(self.num_classes, dtype=torch.bool)
        nobody = dict.fromkeys(("many", "medium", "few"), ~everyone)
        groups = {"all": everyone} | (nobody if class_counts is None else shot_groups(class_counts))
        metrics: dict[str, Any] = {
            name: _percent(int(right[group].sum()), int(images[group].sum())) for name, group in groups.items()
        }
        per_class = [_percent(r, n) for r, n in zip(right.tolist(), images.tolist(), strict=True)]
        tested = [accuracy for accuracy in per_class if accuracy is not None]
        metrics["top5"] = _percent(int(top5), int(images.sum()))
        metrics["class_mean"] = sum(tested) / len(tested) if tested else None
        metrics["per_class"] = per_class
        if self.num_experts is not None:
            metrics["experts_used"] = [n / max(1, sum(used.tolist())) for n in used.tolist()]
        return metrics


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _macs(macs: float | None) -> str:
    """MACs per image with their unit, 78.6 M or 6.13 G."""
    if macs is None:
        return "–"
    return f"{macs / 1e9:.2f} G" if macs >= 999.95e6 else f"{macs / 1e6:.1f} M"


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Plain-text table of metrics, one named row each; what is None or missing stands as a dash.

    Each row may hold "all", "many", "medium", "few", "top5" in percent, "macs" per image, and "experts_used",
    fractions of the samples that used 1, 2, ... experts, shown in percent. No newline at the end.
    """
    accuracies = ("all", "many", "medium", "few", "top5")
    lines = [["", "all", "many", "medium", "few", "top-5", "MACs", "experts used"]]
    for name, metrics in rows.items():
        cells = ["–" if metrics.get(key) is None else f"{metrics[key]:.2f}" for key in accuracies]
        used = " / ".join(f"{100 * share:.1f}" for share in metrics.get("experts_used") or ())
        lines.append([name, *cells, _macs(metrics.get("macs")), f"{used} %" if used else "–"])
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    # Names to the left, numbers to the right, so that decimal points stand below each other.
    texts = [
        [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)] for line in lines
    ]
    texts.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(text).rstrip() for text in texts)

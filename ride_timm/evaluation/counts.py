"""Counts of right answers by class, of confidences by bin and of what experts did; `measures` makes figures of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, RunError
from .metrics import NUM_BINS, Counts, figures

# Sums of fractions are kept as integers in these units, so that they are exact whatever the order of the images and
# the number of processes: 2^-32 for probabilities, 2^-20 nats for divergences (their sums stay far below 2^63).
_CONFIDENCE_UNIT, _DIVERGENCE_UNIT = 2.0**32, 2.0**20


class Accuracy:
    """Counts of a test set, kept as integers on the device: exact, in any order and over any number of processes.

    `num_experts` is for routed predictions, whose updates then name the number of experts used; `num_members` for
    ensembles whose updates give the logits of each member. Usage: `update` by batch, `reduce` once, `compute`. Each
    process counts its own samples, so no sample may be given to two of them.
    """

    def __init__(
        self,
        num_classes: int,
        num_experts: int | None = None,
        device: torch.device | str | None = None,
        num_members: int | None = None,
    ):
        self.num_classes = num_classes
        self.num_experts = num_experts
        self.num_members = num_members
        C, E, M = num_classes, num_experts or 0, num_members or 0
        by_bin, by_member = (C, NUM_BINS), (C if M else 0,)
        shapes = dict(images=(C,), right=(C,), top5=(C,), used=(C, E), member_right=(C, M))
        shapes |= dict(disagreements=by_member, divergence=by_member)
        shapes |= dict(binned=by_bin, binned_right=by_bin, confidence=by_bin)
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        # one row, one all_reduce
        total = sum(shape.numel() for shape in self._shapes.values())
        self._counts = torch.zeros(total, dtype=torch.int64, device=device)
        self._reduced = False

    def _views(self, row: Tensor) -> dict[str, Tensor]:
        parts = row.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def update(
        self, logits: Tensor, targets: Tensor, experts_used: Tensor | None = None, member_logits: Tensor | None = None
    ) -> None:
        """Counts a batch; top-5 is top-C where there are fewer than five classes.

        logits [B, C], targets [B], experts_used [B], from 1 to `num_experts`; member_logits [B, M, C]. InputError for
        logits of other classes, or experts_used or member_logits given without their number or the reverse; RunError
        after `reduce`.
        """
        if self._reduced:
            raise RunError("these counts are summed over the processes already: start a new Accuracy")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise InputError(f"expected logits [B, {self.num_classes}], got shape {tuple(logits.shape)}")
        if (experts_used is None) != (self.num_experts is None):
            raise InputError("experts_used goes with num_experts: give both, for routed predictions, or neither")
        expected = None if self.num_members is None else (len(logits), self.num_members, self.num_classes)
        if (None if member_logits is None else tuple(member_logits.shape)) != expected:
            got = None if member_logits is None else tuple(member_logits.shape)
            raise InputError(f"expected member_logits {expected}, got {got}")
        counts = self._views(self._counts)
        one = torch.ones_like(targets)
        hit = (logits.argmax(1) == targets).to(targets.dtype)
        counts["images"].index_add_(0, targets, one)
        counts["right"].index_add_(0, targets, hit)
        top5 = (logits.topk(min(5, self.num_classes), dim=1).indices == targets[:, None]).any(1)
        counts["top5"].index_add_(0, targets, top5.to(targets.dtype))
        self._update_bins(counts, logits, targets, hit)
        if experts_used is not None:
            counts["used"].view(-1).index_add_(0, targets * self.num_experts + experts_used.long() - 1, one)
        if member_logits is not None:
            self._update_members(counts, logits, targets, member_logits)

    def _update_bins(self, counts: dict[str, Tensor], logits: Tensor, targets: Tensor, hit: Tensor) -> None:
        confidence = logits.float().softmax(1).amax(1).double().nan_to_num(0)
        bins = (confidence * NUM_BINS).ceil().long().clamp_(1, NUM_BINS) - 1  # bin m is ((m-1)/M, m/M]
        cells = targets * NUM_BINS + bins
        counts["binned"].view(-1).index_add_(0, cells, torch.ones_like(targets))
        counts["binned_right"].view(-1).index_add_(0, cells, hit)
        units = (confidence * _CONFIDENCE_UNIT).round().long()
        counts["confidence"].view(-1).index_add_(0, cells, units)

    def _update_members(self, counts: dict[str, Tensor], logits: Tensor, targets: Tensor, members: Tensor) -> None:
        answers = members.argmax(2)  # [B, M]
        counts["member_right"].index_add_(0, targets, (answers == targets[:, None]).to(targets.dtype))
        differ = (answers[:, :, None] != answers[:, None, :]).sum((1, 2)) // 2  # pairs of members
        counts["disagreements"].index_add_(0, targets, differ.to(targets.dtype))
        log_members = members.float().log_softmax(2)
        log_ensemble = logits.float().log_softmax(1)[:, None]
        # a probability of 0 adds nothing, though its logarithm is infinite
        terms = torch.where(log_ensemble.exp() > 0, log_ensemble.exp() * (log_ensemble - log_members), 0.0)
        kl = terms.sum((1, 2)).double().nan_to_num(0, 0, 0).clamp_(min=0)
        counts["divergence"].index_add_(0, targets, (kl * _DIVERGENCE_UNIT).round().long())

    def reduce(self) -> "Accuracy":
        """Sums the counts over all processes, in place; a second call changes nothing."""
        if not self._reduced and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._counts)
        self._reduced = True
        return self

    def compute(
        self, class_counts: Sequence[int] | Tensor | None = None, shots: tuple[int, int] = (100, 20)
    ) -> dict[str, Any]:
        """All figures of `measures.figures`, by the thresholds of many- and few-shot classes.

        class_counts [C], training images of each class, or None where they are unknown. InputError for counts of
        another number of classes.
        """
        if class_counts is not None and len(class_counts) != self.num_classes:
            raise InputError(f"expected {self.num_classes} class counts, got {len(class_counts)}")
        parts = {name: part.numpy() for name, part in self._views(self._counts.cpu()).items()}
        parts["confidence"] = parts["confidence"] / _CONFIDENCE_UNIT
        parts["divergence"] = parts["divergence"] / _DIVERGENCE_UNIT
        counts = Counts(**{name: part for name, part in parts.items() if part.size})
        return figures(counts, class_counts, shots)

"""Counts and predictions of a test set, exact over any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, RunError

NUM_BINS = 15  # of confidence: Guo et al. 2017, arXiv:1706.04599, section 2
# Sums of reals are kept as integers in these units, so that neither the order of images nor the number of processes
# changes a digit: 2^-32 for probabilities, 2^-20 nats for divergences (sums stay far below 2^63).
_CONFIDENCE_UNIT, _DIVERGENCE_UNIT = 2.0**32, 2.0**20


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts by class, and what was predicted for each image.

    targets, predictions [N], probabilities [N]: class, predicted class and its probability of each image, in the order
    of the test set.
    images, right, top5 [C]: test images, and those with the right class first or among the first five.
    binned, binned_right, confidence [C, NUM_BINS]: images, right ones and the sum of confidences, by confidence.
    used [C, E]: images that used 1, 2, … experts; None without a router.
    member_right [C, M], disagreements [C], divergence [C]: right predictions of each member of an ensemble, pairs of
    members that disagree, and the sum over members of KL(ensemble || member) in nats; None without members.
    """

    targets: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray
    images: np.ndarray
    right: np.ndarray
    top5: np.ndarray
    binned: np.ndarray
    binned_right: np.ndarray
    confidence: np.ndarray
    used: np.ndarray | None = None
    member_right: np.ndarray | None = None
    disagreements: np.ndarray | None = None
    divergence: np.ndarray | None = None


class CountAccumulator:
    """Accumulates `Counts` on the device, or on the CPU for one without float64: `update` by batch, `reduce` once.

    num_experts: of a routed model, whose updates pass the number of experts used; num_members: of an ensemble whose
    updates pass the logits of every member. Each process updates with its own samples.
    """

    def __init__(
        self,
        num_classes: int,
        num_experts: int | None = None,
        num_members: int | None = None,
        device: torch.device | str | None = None,
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
        # one tensor, so that one all_reduce sums everything
        total = sum(shape.numel() for shape in self._shapes.values())
        self._device = torch.device("cpu" if device is None or torch.device(device).type == "mps" else device)
        self._counts = torch.zeros(total, dtype=torch.int64, device=self._device)
        self._views = self._split(self._counts)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []  # targets, predictions, probabilities
        self._samples: tuple[np.ndarray, ...] = ()
        self._reduced = False

    def _split(self, counts: Tensor) -> dict[str, Tensor]:
        parts = counts.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def update(
        self, logits: Tensor, targets: Tensor, experts_used: Tensor | None = None, member_logits: Tensor | None = None
    ) -> None:
        """Count a batch; top-5 is top-C with fewer than five classes.

        logits [B, C], targets [B], experts_used [B] from 1 to `num_experts`, member_logits [B, M, C].
        InputError for other shapes, or for experts_used or member_logits without their number and the reverse;
        RunError after `reduce`.
        """
        if self._reduced:
            raise RunError("these counts are already summed over the processes: start a new CountAccumulator")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise InputError(f"expected logits [B, {self.num_classes}], got shape {tuple(logits.shape)}")
        if (experts_used is None) != (self.num_experts is None):
            raise InputError("experts_used goes with num_experts: pass both, for routed predictions, or neither")
        expected = None if self.num_members is None else (len(logits), self.num_members, self.num_classes)
        shape = None if member_logits is None else tuple(member_logits.shape)
        if shape != expected:
            raise InputError(f"expected member_logits {expected}, got {shape}")
        logits, targets = logits.to(self._device), targets.to(self._device)
        views, one = self._views, torch.ones_like(targets)
        predictions = logits.argmax(1)
        right = (predictions == targets).to(targets.dtype)
        top5 = (logits.topk(min(5, self.num_classes), dim=1).indices == targets[:, None]).any(1)
        views["images"].index_add_(0, targets, one)
        views["right"].index_add_(0, targets, right)
        views["top5"].index_add_(0, targets, top5.to(targets.dtype))
        probabilities = self._update_bins(logits, targets, right)
        self._batches.append((targets, predictions, probabilities))
        if experts_used is not None:
            views["used"].view(-1).index_add_(0, targets * self.num_experts + experts_used.to(targets) - 1, one)
        if member_logits is not None:
            self._update_members(logits, targets, member_logits.to(self._device))

    def _update_bins(self, logits: Tensor, targets: Tensor, right: Tensor) -> Tensor:
        confidence = logits.float().softmax(1).amax(1).double().nan_to_num(0)
        bins = (confidence * NUM_BINS).ceil().long().clamp_(1, NUM_BINS) - 1  # bin m is ((m-1)/M, m/M]
        cells = targets * NUM_BINS + bins
        units = (confidence * _CONFIDENCE_UNIT).round().long()
        for name, values in (("binned", torch.ones_like(targets)), ("binned_right", right), ("confidence", units)):
            self._views[name].view(-1).index_add_(0, cells, values)
        return confidence

    def _update_members(self, logits: Tensor, targets: Tensor, members: Tensor) -> None:
        classes = members.argmax(2)  # [B, M]
        right = (classes == targets[:, None]).to(targets.dtype)
        differ = (classes[:, :, None] != classes[:, None, :]).sum((1, 2)) // 2  # pairs of members
        log_members = members.float().log_softmax(2)
        log_ensemble = logits.float().log_softmax(1)[:, None]
        # a probability of 0 adds 0, though its logarithm is infinite
        terms = torch.where(log_ensemble.exp() > 0, log_ensemble.exp() * (log_ensemble - log_members), 0.0)
        kl = terms.sum((1, 2)).double().nan_to_num(0, 0, 0).clamp_(min=0)
        self._views["member_right"].index_add_(0, targets, right)
        self._views["disagreements"].index_add_(0, targets, differ.to(targets.dtype))
        self._views["divergence"].index_add_(0, targets, (kl * _DIVERGENCE_UNIT).round().long())

    def reduce(self) -> Counts:
        """The counts summed over all processes; a second call returns the same."""
        if not self._reduced:
            batches = [[tuple(part.cpu().numpy() for part in batch) for batch in self._batches]]
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(self._counts)
                own, batches = batches[0], [[]] * dist.get_world_size()
                dist.all_gather_object(batches, own)
            # processes hold slices of the same batches, in the order of their ranks
            slices = [part for batch in zip_longest(*batches) for part in batch if part is not None]
            empty = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
            self._samples = tuple(map(np.concatenate, zip(empty, *slices, strict=True)))
        self._reduced = True
        parts = {name: part.numpy() for name, part in self._split(self._counts.cpu()).items()}
        parts["confidence"] = parts["confidence"] / _CONFIDENCE_UNIT
        parts["divergence"] = parts["divergence"] / _DIVERGENCE_UNIT
        return Counts(*self._samples, **{name: part for name, part in parts.items() if part.size})

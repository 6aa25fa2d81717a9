"""Mutual learning: mild logit adjustment, and experts that teach each other."""

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..hardware import double
from ..keys import key
from .balpoe import BalPoELoss
from .base import register_loss
from .terms import batch_mean, cross_entropy, sum_processes

MOMENTUM = 0.1  # of a class' running accuracy, for each batch that holds it


@register_loss(
    "mutual",
    citation="mutual learning of experts",
    paper="1706.00384",
    summary="adjusts the logits of each expert to the class prior by nearly the same strength, and teaches each expert "
    "what another is right about",
)
class MutualLoss(BalPoELoss):
    """BalPoE's adjustment with taus of 0.9 to 1.1, and KL between the experts, averaged over experts.

    Each expert j learns from every other expert i by KL(i || j) of their adjusted logits, i detached, averaged over i.
    Zhang et al. 2018, arXiv:1706.00384, equation 5, has the plain form. With `mutual_gate`, i teaches only images it is
    right about, with a weight for their class: sqrt(1 - its running accuracy), with mean 1 over the classes, so that
    hard classes are taught most. Of a mixed image both labels count, so mixup brings these weights closer together.
    """

    reach = 0.1

    mutual: float = key(1.0, "weight of what the experts teach each other", low=0, high=100)
    mutual_gate: bool = key(True, "teach only what the teacher is right about, hard classes most")

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        # part of the state: it follows from all batches so far
        self.register_buffer("accuracy", torch.zeros(len(self.offsets[0])))

    @classmethod
    def arguments(cls, recipe: Any) -> dict[str, Any]:
        if recipe.mutual and recipe.num_experts == 1:
            raise InputError("loss=mutual needs at least 2 experts: raise num_experts, or choose logit_adjustment.")
        return super().arguments(recipe)

    @property
    def hardness(self) -> Tensor:
        """Weight of each class, [C]: sqrt(1 - running accuracy), with mean 1 where a class is hard at all."""
        weights = (1 - self.accuracy).clamp_min(0).sqrt()
        return weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        log_p = self.adjusted(expert_logits).log_softmax(-1)
        num_experts = log_p.shape[1]
        base = cross_entropy(log_p, targets, self.class_weights, label_smoothing=self.label_smoothing) / num_experts
        if not self.mutual:
            return base
        taught = log_p.detach()
        # KL(i || j) of each image, [B, i, j], 0 for i = j; no matrix product, which autocast would round to bf16
        kl = (taught.exp()[:, :, None] * (taught[:, :, None] - log_p[:, None])).sum(-1)
        kl = kl * (1 - torch.eye(num_experts, dtype=kl.dtype, device=kl.device))
        if self.mutual_gate:
            right = taught.argmax(-1) == targets[:, None]  # [B, i]
            if self.training:
                self._follow(right, targets)
            kl = kl * (right * self.hardness[targets][:, None])[..., None]
        return base + self.mutual * batch_mean(kl.sum((1, 2)) / (num_experts * (num_experts - 1)))

    @torch.no_grad()
    def _follow(self, right: Tensor, targets: Tensor) -> None:
        """Move the running accuracies of a batch's classes, over all processes."""
        fractions = double(right).mean(1)
        seen = fractions.new_zeros(2, len(self.accuracy))
        seen.index_add_(1, targets.to(seen.device), torch.stack([fractions, torch.ones_like(fractions)]))
        sum_processes(seen)
        accuracy = seen[0] / seen[1].clamp_min(1)
        step = MOMENTUM * (seen[1] > 0) * (accuracy - self.accuracy.to(seen.device))
        self.accuracy.add_(step.to(self.accuracy))

"""LDAM with deferred re-weighting."""

from typing import Any

from torch import Tensor

from .. import priors
from ..keys import key
from .base import ExpertsLoss, register_loss
from .terms import cross_entropy


@register_loss("ldam", citation="LDAM", paper="1906.07413", summary="asks for wider margins of rarer classes")
class LDAMLoss(ExpertsLoss):
    """LDAM-DRW of the ensemble's logits; without class counts, cross entropy.

    Class weights by effective numbers act from `reweight_epoch` on, epochs counted from 0; -1 means never. Kept from
    the authors: the margin is multiplied by s although the logits of a cosine head already carry that scale, so with a
    linear head it is s times as large as it looks. Cao et al. 2019, arXiv:1906.07413, section 3 and algorithm 1.
    """

    max_margin: float = key(0.5, "largest margin", above=0)
    reweight: bool = key(True, "deferred re-weighting by effective numbers")
    reweight_epoch: int = key(160, "epochs before re-weighting begins; -1: never", low=-1, in_epochs=True)
    s: float = 30.0

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        self.margins: Tensor | None
        self.class_weights: Tensor | None
        known = class_counts is not None
        self._keep("margins", priors.ldam_margins(class_counts, self.max_margin) if known else None)
        self._keep("class_weights", priors.effective_number_weights(class_counts) if known else None)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; from reweight_epoch on, with class weights."""
        deferred = self.reweight and self.reweight_epoch != -1 and self.class_weights is not None
        self.reweighting = deferred and epoch >= self.reweight_epoch

    def removed_log_prior(self) -> Tensor | float:
        return -self.class_weights.log() if self.reweighting and self.class_weights is not None else 0.0

    def over_experts(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """LDAM of each expert on its own, summed over experts."""
        class_weights = self.class_weights if self.reweighting else None
        return cross_entropy(expert_logits, targets, class_weights, self.margins, self.s)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return self.over_experts(expert_logits.mean(1, keepdim=True), targets)

"""RIDE's loss: LDAM of each expert and a distribution-aware diversity term."""

from typing import Any

import torch
from torch import Tensor

from .. import priors
from ..keys import key
from .base import register_loss
from .ldam import LDAMLoss
from .terms import diversity


@register_loss(
    "ride",
    citation="RIDE",
    paper="2010.01809",
    summary="drives the experts apart and asks for wider margins of rarer classes",
)
class RideLoss(LDAMLoss):
    """LDAM of each expert plus a distribution-aware diversity term.

    Sum over e of base_loss_factor * LDAM(z_e) + additional_diversity_factor * mean(T)^2 * KL(ensemble / T || z_e /
    T). A negative factor drives the experts apart. With re-weighting (see `LDAMLoss`) class weights enter LDAM and T
    becomes class-wise (`priors.class_temperature`); before, and without, T = base_diversity_temperature. Kept from the
    authors: factor 0 not only drops the diversity term, it makes the loss collaborative, LDAM of the mean logits
    counted once per expert; the KL is to the detached mean of the experts. RIDE, arXiv:2010.01809, section 3.2,
    equations 2 to 4.
    """

    additional_diversity_factor: float = key(
        -0.45, "factor of the diversity term, lambda; 0 makes the loss collaborative"
    )
    base_diversity_temperature: float = key(1.0, "temperature of the diversity term", above=0)
    reweight_factor: float = key(0.05, "spread of the class-wise temperature", low=0, high=1)
    base_loss_factor: float = 1.0

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        self.temperature: Tensor
        self.class_temperature: Tensor
        base, factor = self.base_diversity_temperature, self.reweight_factor
        self._keep("temperature", torch.tensor([base]))  # [1], the same for every class
        known = class_counts is not None
        self._keep("class_temperature", priors.class_temperature(class_counts, base, factor) if known else None)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        if self.additional_diversity_factor == 0:
            return self.base_loss_factor * expert_logits.shape[1] * super().compute(expert_logits, targets)
        base = self.over_experts(expert_logits, targets)
        term = diversity(expert_logits, self.class_temperature if self.reweighting else self.temperature)
        return self.base_loss_factor * base + self.additional_diversity_factor * term

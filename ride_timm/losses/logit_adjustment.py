"""Logit adjustment and balanced softmax."""

from typing import Any

from torch import Tensor

from .. import priors
from ..keys import key
from .base import SmoothedLoss, register_loss
from .terms import cross_entropy


@register_loss(
    "logit_adjustment",
    citation="logit adjustment",
    paper="2007.07314",
    summary="adjusts the logits to the class prior",
)
@register_loss(
    "balanced_softmax",
    citation="balanced softmax",
    paper="2007.10740",
    summary="adjusts the logits to the class prior",
    tau=1.0,
)
class LogitAdjustedLoss(SmoothedLoss):
    """Cross entropy of the ensemble's logits plus tau * log(prior).

    tau 1 is balanced softmax. Menon et al. 2021, arXiv:2007.07314, equation 10. Balanced softmax: Ren et al. 2020,
    arXiv:2007.10740, section 3; its n_c differ from the prior by a factor that cancels in the softmax.
    """

    tau: float = key(1.0, "strength of the adjustment", low=0, high=10)

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        self.offset: Tensor
        self._keep("offset", self.tau * priors.log_prior(class_counts))  # [C]

    def removed_log_prior(self) -> Tensor | float:
        return super().removed_log_prior() + self.offset

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        adjusted = expert_logits.mean(1, keepdim=True) + self.offset
        return cross_entropy(adjusted, targets, self.class_weights, label_smoothing=self.label_smoothing)

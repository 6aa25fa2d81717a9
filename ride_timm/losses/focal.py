"""Focal loss, and its class-balanced form."""

from torch import Tensor

from ..keys import key
from .base import ClassBalancedLoss, register_loss
from .terms import focal


@register_loss(
    "cb_focal",
    citation="the class-balanced focal loss",
    paper="1901.05555",
    summary="weights classes by their effective number of images, and hard images more",
    class_balanced=True,
)
@register_loss(
    "focal",
    citation="the focal loss",
    paper="1708.02002",
    summary="weights hard images more",
    class_balanced=False,
)
class FocalLoss(ClassBalancedLoss):
    """Focal loss of the ensemble's logits; gamma 0 is cross entropy.

    `class_balanced` weights it by effective numbers. Lin et al. 2017, arXiv:1708.02002, equation 4; class-balanced:
    Cui et al. 2019, arXiv:1901.05555, section 4, here with a softmax, where they take a sigmoid for each class.
    """

    gamma: float = key(1.0, "focusing exponent", low=0)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return focal(expert_logits.mean(1), targets, self.gamma, self.class_weights)

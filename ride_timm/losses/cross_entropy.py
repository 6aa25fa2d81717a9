"""Cross entropy, and its class-balanced form."""

from torch import Tensor

from .base import ClassBalancedLoss, SmoothedLoss, register_loss
from .terms import cross_entropy


@register_loss(
    "cb_ce",
    citation="class-balanced cross entropy",
    paper="1901.05555",
    summary="weights classes by their effective number of images",
    class_balanced=True,
)
@register_loss("ce", citation="cross entropy", summary="treats all images alike", class_balanced=False)
class CrossEntropyLoss(ClassBalancedLoss, SmoothedLoss):
    """Cross entropy of the ensemble's logits.

    `class_balanced` weights it by effective numbers from the first epoch: Cui et al. 2019, arXiv:1901.05555, section 4.
    """

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        logits = expert_logits.mean(1, keepdim=True)
        return cross_entropy(logits, targets, self.class_weights, label_smoothing=self.label_smoothing)

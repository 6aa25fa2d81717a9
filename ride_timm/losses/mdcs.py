"""MDCS: BalPoE's adjustment, and a strong view distilled from a weak one."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..keys import key
from .balpoe import BalPoELoss
from .base import register_loss
from .terms import batch_mean, cross_entropy


@register_loss(
    "mdcs",
    citation="MDCS",
    paper="2308.09922",
    summary="adjusts the logits of each expert to the class prior by a strength of its own and distils a weakly "
    "augmented view of each image into a strongly augmented one",
)
class MdcsLoss(BalPoELoss):
    """Logit adjustment by a tau for each expert, and consistency of two views.

    expert_logits [2B, E, C]: of B weakly augmented images, then of the same images strongly augmented; targets [B].
    Each expert, adjusted as in BalPoE, learns both views by cross entropy and, where it is right about the weak view,
    the strong view by KL(weak || strong) with the weak one detached, averaged over those samples; summed over experts.
    The KL is weighted by `consistency`, after a linear ramp of 20 epochs, however many the run has. InputError for
    logits that are not two per target. Zhao et al. 2023, arXiv:2308.09922, section 3; consistency, taus and ramp are
    those of their code.
    """

    num_views: ClassVar[int] = 2
    reach: ClassVar[float] = 1.5
    ramp_epochs: ClassVar[int] = 20

    consistency: float = key(0.6, "weight of the strong view's consistency with the weak one", low=0, high=100)

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        # a tensor: compiled, a number would be one graph an epoch
        self.register_buffer("strength", torch.zeros(()), persistent=False)
        self.set_epoch(0)

    @classmethod
    def arguments(cls, recipe: Any) -> dict[str, Any]:
        if recipe.auto_augment is None:
            raise InputError("loss=mdcs compares a weak and a strong view: set auto_augment, such as rand-m9-mstd0.5.")
        if recipe.mixup_alpha or recipe.cutmix_alpha:
            raise InputError("loss=mdcs compares two views of an image: set mixup_alpha and cutmix_alpha to 0.")
        return super().arguments(recipe)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; the weight of the consistency ramps up."""
        self.strength.fill_(self.consistency * min((epoch + 1) / self.ramp_epochs, 1.0))

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        if len(expert_logits) != 2 * len(targets):
            raise InputError(f"expected the logits of two views of {len(targets)} images, got {len(expert_logits)}")
        adjusted = self.adjusted(expert_logits)
        both = targets.repeat(2)
        base = cross_entropy(adjusted, both, self.class_weights, label_smoothing=self.label_smoothing)
        weak, strong = adjusted.chunk(2)
        right = weak.argmax(-1) == targets[:, None]  # [B, E]
        target = weak.log_softmax(-1).detach()
        kl = F.kl_div(strong.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)  # [B, E]
        consistency = torch.stack([batch_mean(kl[:, e], right[:, e]) for e in range(kl.shape[1])])
        return base + self.strength * consistency.sum()

"""Losses over the logits of all experts that need no prior: cross entropy, focal, LDAM, and RIDE's own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import priors
from ..errors import InputError
from .terms import cross_entropy, diversity, focal, widen


class ExpertsLoss(nn.Module):
    """A loss over all experts: buffers follow device moves and stay out of `state_dict`, the recipe restores them.

    expert_logits [B, E, C], targets [B] -> scalar. InputError where C is not the number of class counts.
    """

    num_views = 1  # of each image in a batch

    def __init__(self, class_counts: Sequence[int] | Tensor | None = None):
        super().__init__()
        self.register_buffer("offsets", None)  # [E, C], added to the logits where experts differ in their prior
        self.num_classes = None if class_counts is None else len(class_counts)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; most losses are the same in all of them."""

    def forward(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of one batch."""
        if expert_logits.ndim != 3 or self.num_classes not in (None, expert_logits.shape[-1]):
            raise InputError(
                f"expected expert logits [B, E, {self.num_classes or 'C'}], got shape {tuple(expert_logits.shape)}"
            )
        return self.compute(widen(expert_logits), targets)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """The loss itself, of checked and widened logits."""
        raise NotImplementedError

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)


def check_smoothing(label_smoothing: float) -> float:
    """The share of a label that goes to all classes; InputError outside [0, 1)."""
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    return label_smoothing


class CrossEntropyLoss(ExpertsLoss):
    """Cross entropy of the mean of the experts' logits; `class_balanced` weighs it by effective numbers from the start.

    InputError for `class_balanced` without class counts, or a label_smoothing outside [0, 1). Cui et al. 2019,
    arXiv:1901.05555, section 4.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor | None = None,
        class_balanced: bool = False,
        label_smoothing: float = 0.0,
    ):
        super().__init__(class_counts)
        if class_balanced and class_counts is None:
            raise InputError("class-balanced cross entropy needs class counts")
        self.label_smoothing = check_smoothing(label_smoothing)
        self._keep("class_weights", priors.effective_number_weights(class_counts) if class_balanced else None)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.label_smoothing
        return cross_entropy(
            expert_logits.mean(1, keepdim=True), targets, self.class_weights, label_smoothing=smoothing
        )


class FocalLoss(ExpertsLoss):
    """Focal loss of the mean of the experts' logits; gamma 0, the authors' default, is plain cross entropy.

    `class_balanced` weighs it by effective numbers. InputError for a negative gamma, or `class_balanced` without class
    counts. Lin et al. 2017, arXiv:1708.02002, equation 4; class-balanced focal loss: Cui et al. 2019,
    arXiv:1901.05555, section 4, here of the softmax, where they take a sigmoid for every class.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor | None = None,
        gamma: float = 0.0,
        class_balanced: bool = False,
    ):
        super().__init__(class_counts)
        if not gamma >= 0:
            raise InputError(f"gamma must be at least 0, got {gamma}")
        if class_balanced and class_counts is None:
            raise InputError("class-balanced focal loss needs class counts")
        self.gamma = gamma
        self._keep("class_weights", priors.effective_number_weights(class_counts) if class_balanced else None)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return focal(expert_logits.mean(1), targets, self.gamma, self.class_weights)


class LDAMLoss(ExpertsLoss):
    """LDAM with deferred re-weighting (LDAM-DRW) on the mean of the experts' logits; without counts, cross entropy.

    Kept from the authors: the margin is multiplied by s although the logits of a cosine head already carry that
    scale, so with a linear head it is s times as large as it looks. Re-weighting starts at epoch > reweight_epoch of
    epochs counted from 1, which is epoch >= reweight_epoch of ours; -1 means never. InputError for an s or max_m that
    is not above 0, or a reweight_epoch below -1. Cao et al. 2019, arXiv:1906.07413, section 3 and algorithm 1.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor | None = None,
        max_m: float = 0.5,
        s: float = 30.0,
        reweight_epoch: int = -1,
    ):
        super().__init__(class_counts)
        if not (s > 0 and max_m > 0):
            raise InputError(f"max_m and s must be above 0, got {max_m} and {s}")
        if not reweight_epoch >= -1:
            raise InputError(f"reweight_epoch must be an epoch, or -1 for never, got {reweight_epoch}")
        self.s = s
        self.reweight_epoch = reweight_epoch
        known = class_counts is not None
        self._keep("margins", priors.ldam_margins(class_counts, max_m) if known else None)
        self._keep("class_weights", priors.effective_number_weights(class_counts) if known else None)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; the class weights act in epochs >= reweight_epoch."""
        self.reweighting = self.reweight_epoch != -1 and epoch >= self.reweight_epoch and self.class_weights is not None

    def over_experts(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """The same loss of every expert on its own, summed over them."""
        class_weights = self.class_weights if self.reweighting else None
        return cross_entropy(expert_logits, targets, class_weights, self.margins, self.s)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return self.over_experts(expert_logits.mean(1, keepdim=True), targets)


class RideLoss(ExpertsLoss):
    """RIDE's stage one: LDAM of each expert plus a distribution-aware diversity term, summed over the experts.

    Sum over e of base_loss_factor * LDAM(z_e) + additional_diversity_factor * mean(T)^2 * KL(ensemble / T || z_e /
    T). A negative factor drives the experts apart. From `reweight_epoch` on (see `LDAMLoss`) class weights enter LDAM
    and T becomes class-wise (`priors.class_temperature`); before, and with `reweight` off, T =
    base_diversity_temperature. Kept from the authors: factor 0 does not only drop the diversity term, it makes the
    loss collaborative, LDAM of the mean logits once for every expert; the KL is to the detached mean of the experts;
    LDAM's margin is scaled by s once more. InputError for a temperature or s out of range. RIDE, arXiv:2010.01809,
    section 3.2, equations 2 to 4.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor | None = None,
        base_loss_factor: float = 1.0,
        max_m: float = 0.5,
        s: float = 30.0,
        additional_diversity_factor: float = -0.2,
        base_diversity_temperature: float = 1.0,
        reweight: bool = True,
        reweight_epoch: int = -1,
        reweight_factor: float = 0.05,
    ):
        super().__init__(class_counts)
        if not base_diversity_temperature > 0:
            raise InputError(f"base_diversity_temperature must be above 0, got {base_diversity_temperature}")
        self.base = LDAMLoss(class_counts, max_m, s, reweight_epoch if reweight else -1)
        self.base_loss_factor = base_loss_factor
        self.additional_diversity_factor = additional_diversity_factor
        self._keep("temperature", torch.tensor([float(base_diversity_temperature)]))  # [1], the same for every class
        class_temperature = None
        if class_counts is not None:
            class_temperature = priors.class_temperature(class_counts, base_diversity_temperature, reweight_factor)
        self._keep("class_temperature", class_temperature)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; class weights and temperatures act in epochs >= reweight_epoch."""
        self.base.set_epoch(epoch)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        if self.additional_diversity_factor == 0:
            return self.base_loss_factor * expert_logits.shape[1] * self.base.compute(expert_logits, targets)
        temperature = self.class_temperature if self.base.reweighting else self.temperature
        base = self.base.over_experts(expert_logits, targets)
        diverse = diversity(expert_logits, temperature)
        return self.base_loss_factor * base + self.additional_diversity_factor * diverse

"""Losses that adjust logits by the training prior: balanced softmax, logit adjustment, SADE, BalPoE, MDCS.

Adding tau * log(prior) to the logits in training leaves a model whose bare logits suit a test set with class
frequencies prior^(1 - tau): the training set's own for tau 0, balanced ones for tau 1, inverted ones for tau 2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import priors
from ..errors import InputError
from .experts import ExpertsLoss, check_smoothing
from .terms import batch_mean, cross_entropy


class LogitAdjustedLoss(ExpertsLoss):
    """Cross entropy of the mean of the experts' logits plus tau * log(prior); tau 1 is the balanced softmax.

    InputError without class counts, or for a tau or label_smoothing out of range. Menon et al. 2021, arXiv:2007.07314,
    equation 10; balanced softmax: Ren et al. 2020, arXiv:2007.10740, section 3, whose n_c differs from the prior by a
    factor that the softmax does not see.
    """

    def __init__(self, class_counts: Sequence[int] | Tensor, tau: float = 1.0, label_smoothing: float = 0.0):
        super().__init__(class_counts)
        if not 0 <= tau < float("inf"):
            raise InputError(f"tau must be at least 0, got {tau}")
        self.label_smoothing = check_smoothing(label_smoothing)
        self._keep("offset", tau * priors.log_prior(class_counts))  # [C]

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        adjusted = expert_logits.mean(1, keepdim=True) + self.offset
        return cross_entropy(adjusted, targets, label_smoothing=self.label_smoothing)


class OffsetExpertsLoss(ExpertsLoss):
    """Cross entropy of every expert's logits plus offsets of its own, summed over experts.

    offsets [E, C]. InputError for another number of experts, or a label_smoothing out of range.
    """

    def __init__(self, class_counts: Sequence[int] | Tensor, offsets: Tensor, label_smoothing: float = 0.0):
        super().__init__(class_counts)
        self.label_smoothing = check_smoothing(label_smoothing)
        self.register_buffer("offsets", offsets, persistent=False)

    def adjusted(self, expert_logits: Tensor) -> Tensor:
        """The logits plus each expert's offsets, [B, E, C]."""
        num_experts = len(self.offsets)
        if expert_logits.shape[1] != num_experts:
            raise InputError(f"this loss trains {num_experts} experts, the model has {expert_logits.shape[1]}")
        return expert_logits + self.offsets

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.adjusted(expert_logits), targets, label_smoothing=self.label_smoothing)


class SadeLoss(OffsetExpertsLoss):
    """SADE's three experts: cross entropy, balanced softmax and inverse softmax, summed.

    Offsets 0, log(prior), and log(prior) - inverse_tau * log(inverse prior), the last for a test set in which the
    frequencies of the classes are in the opposite order (`priors.inverse_log_prior`). InputError for a model of other
    than three experts. Zhang et al. 2022, arXiv:2107.09249, equations 1 to 3; inverse_tau is their lambda, 2.
    """

    def __init__(self, class_counts: Sequence[int] | Tensor, inverse_tau: float = 2.0, label_smoothing: float = 0.0):
        if not 0 <= inverse_tau < float("inf"):
            raise InputError(f"inverse_tau must be at least 0, got {inverse_tau}")
        prior = priors.log_prior(class_counts)
        inverse = prior - inverse_tau * priors.inverse_log_prior(class_counts)
        super().__init__(class_counts, torch.stack([torch.zeros_like(prior), prior, inverse]), label_smoothing)


class BalPoELoss(OffsetExpertsLoss):
    """BalPoE: logit adjustment by a tau for each expert, the mean over experts.

    Expert e suits a test prior of prior^(1 - tau_e). With a mean tau of 1 these exponents cancel, so that the mean of
    the logits, a product of experts, is calibrated to the balanced prior; other means are an InputError. Aimar et al.
    2023, arXiv:2206.05260, section 3; the mean over experts is that of their code.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        taus: Sequence[float] = (0.0, 1.0, 2.0),
        label_smoothing: float = 0.0,
    ):
        check_taus(taus)
        strengths = torch.tensor([float(tau) for tau in taus])
        super().__init__(class_counts, strengths[:, None] * priors.log_prior(class_counts), label_smoothing)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return super().compute(expert_logits, targets) / len(self.offsets)


class MdcsLoss(OffsetExpertsLoss):
    """MDCS: logit adjustment by a tau for each expert, and consistency of a strong view with a weak one, summed.

    expert_logits [2B, E, C], those of B weakly augmented images, then of the same images strongly augmented; targets
    [B]. Every expert, adjusted as in BalPoE, learns both views by cross entropy and, where it is right about the weak
    view, learns its strong view from it: KL(weak || strong), no gradient through the weak one, the mean over those
    samples. That part counts `consistency` times, after a linear warm-up of 20 epochs. InputError for taus whose mean
    is not 1, a consistency below 0, or logits that are not twice the targets. Zhao et al. 2023, arXiv:2308.09922,
    section 3 (diversity loss, consistency self-distillation, confident instance sampling); consistency 0.6, taus -0.5,
    1, 2.5 and the warm-up are those of their code.
    """

    num_views = 2
    warmup_epochs = 20

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        taus: Sequence[float] = (-0.5, 1.0, 2.5),
        consistency: float = 0.6,
        label_smoothing: float = 0.0,
    ):
        check_taus(taus)
        if not 0 <= consistency < float("inf"):
            raise InputError(f"consistency must be at least 0, got {consistency}")
        strengths = torch.tensor([float(tau) for tau in taus])
        super().__init__(class_counts, strengths[:, None] * priors.log_prior(class_counts), label_smoothing)
        self.consistency = consistency
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; the consistency warms up over the first ones."""
        self.strength = self.consistency * min((epoch + 1) / self.warmup_epochs, 1.0)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        if len(expert_logits) != 2 * len(targets):
            raise InputError(f"expected the logits of two views of {len(targets)} images, got {len(expert_logits)}")
        adjusted = self.adjusted(expert_logits)
        base = cross_entropy(adjusted, targets.repeat(2), label_smoothing=self.label_smoothing)
        weak, strong = adjusted.chunk(2)
        right = weak.argmax(-1) == targets[:, None]  # [B, E]
        target = weak.log_softmax(-1).detach()
        kl = F.kl_div(strong.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)  # [B, E]
        return base + self.strength * sum(batch_mean(kl[:, e], right[:, e]) for e in range(kl.shape[1]))


def check_taus(taus: Sequence[float]) -> None:
    """InputError unless the strengths of the experts' logit adjustment have a mean of 1."""
    mean = sum(taus) / len(taus) if len(taus) else float("nan")
    if not abs(mean - 1) < 1e-6:
        listed = ", ".join(f"{tau:g}" for tau in taus) or "(none)"
        raise InputError(
            f"taus {listed} have a mean of {mean:g}: expected 1, as 0, 1, 2 have, so that the average of the experts "
            "suits a balanced test set"
        )

"""Losses that adjust logits by the training prior: balanced softmax, logit adjustment, SADE's experts and BalPoE's.

Adding tau * log(prior) to the logits in training leaves a model whose bare logits suit a test set with class
frequencies prior^(1 - tau): the training set's own for tau 0, balanced ones for tau 1, inverted ones for tau 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import priors
from ..errors import InputError
from .experts import ExpertsLoss, check_smoothing
from .terms import cross_entropy


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
        self._keep("offsets", offsets)

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


def check_taus(taus: Sequence[float]) -> None:
    """InputError unless the strengths of the experts' logit adjustment have a mean of 1."""
    mean = sum(taus) / len(taus) if len(taus) else float("nan")
    if not abs(mean - 1) < 1e-6:
        listed = ", ".join(f"{tau:g}" for tau in taus) or "(none)"
        raise InputError(
            f"taus {listed} have a mean of {mean:g}: expected 1, as 0, 1, 2 have, so that the average of the experts "
            "suits a balanced test set"
        )

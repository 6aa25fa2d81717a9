"""BalPoE: logit adjustment with a strength for each expert."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import priors
from ..errors import InputError
from ..keys import key
from .base import PerExpertPriorLoss, register_loss


@register_loss(
    "balpoe",
    citation="BalPoE",
    paper="2206.05260",
    summary="adjusts the logits of each expert to the class prior by a strength of its own",
)
class BalPoELoss(PerExpertPriorLoss):
    """Logit adjustment by a tau for each expert, averaged over experts.

    Expert e suits a test prior of prior^(1 - tau_e). With a mean tau of 1 these exponents cancel, so the mean of the
    logits, a product of experts, is calibrated for a balanced prior; another mean is an InputError. Aimar et al. 2023,
    arXiv:2206.05260, section 3; the mean over experts is that of their code.
    """

    reach: ClassVar[float] = 1.0

    tau_reach: float | None = key(
        None,
        "without taus, they are evenly from 1 - tau_reach to 1 + tau_reach (default: 1; mdcs 1.5; mutual 0.1)",
        low=0,
        high=10,
    )
    taus: tuple[float, ...] = key(
        (), "strength of the adjustment by expert, mean 1 (default: evenly around 1)", low=-10, high=10
    )

    def make_offsets(self, class_counts: Any) -> Tensor:
        self.taus = self.taus or self.spread(3, self.tau_reach)
        check_taus(self.taus)
        return torch.tensor(self.taus)[:, None] * priors.log_prior(class_counts)

    @classmethod
    def spread(cls, num_experts: int, reach: float | None) -> tuple[float, ...]:
        """Taus from 1 - reach to 1 + reach, evenly; by default those of the paper."""
        reach, last = cls.reach if reach is None else reach, num_experts - 1
        return tuple(1 + reach * (2 * i / last - 1) if last else 1.0 for i in range(num_experts))

    @classmethod
    def arguments(cls, recipe: Any) -> dict[str, Any]:
        taus = recipe.taus or cls.spread(recipe.num_experts, recipe.tau_reach)
        if len(taus) != recipe.num_experts:
            raise InputError(f"taus: got {len(taus)} for {recipe.num_experts} experts; pass one for each, or none.")
        check_taus(taus)
        return super().arguments(recipe) | dict(taus=taus)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return super().compute(expert_logits, targets) / len(self.taus)


def check_taus(taus: Sequence[float]) -> None:
    """InputError for taus whose mean is not 1."""
    mean = sum(taus) / len(taus)
    if not abs(mean - 1) < 1e-6:
        raise InputError(
            f"taus {', '.join(f'{tau:g}' for tau in taus)} have a mean of {mean:g}: expected 1, as of 0, 1, 2; "
            "otherwise the mean of the experts does not suit a balanced test set"
        )

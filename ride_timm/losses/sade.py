"""SADE: three experts for three class priors."""

from typing import Any

import torch
from torch import Tensor

from .. import priors
from ..errors import InputError
from ..keys import key
from .base import PerExpertPriorLoss, register_loss


@register_loss("sade", citation="SADE", paper="2107.09249", summary="trains each expert for another class prior")
class SadeLoss(PerExpertPriorLoss):
    """Cross entropy, balanced softmax and inverse softmax, of one expert each.

    Offsets 0, log(prior), and log(prior) - inverse_tau * log(inverse prior), the last for a test set whose class
    frequencies are in reverse order (`priors.inverse_log_prior`). Zhang et al. 2022, arXiv:2107.09249, equations 1 to
    3; inverse_tau is their lambda, 2.
    """

    inverse_tau: float = key(2.0, "strength of the inverse prior of the third expert", low=0, high=10)

    def make_offsets(self, class_counts: Any) -> Tensor:
        prior = priors.log_prior(class_counts)
        inverse = prior - self.inverse_tau * priors.inverse_log_prior(class_counts)
        return torch.stack([torch.zeros_like(prior), prior, inverse])

    @classmethod
    def arguments(cls, recipe: Any) -> dict[str, Any]:
        if recipe.num_experts != 3:
            raise InputError(f"num_experts={recipe.num_experts}: loss 'sade' trains 3 experts.")
        return super().arguments(recipe)

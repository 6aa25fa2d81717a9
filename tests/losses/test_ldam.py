"""LDAM with deferred re-weighting, against torch."""

import torch
import torch.nn.functional as F
from expert_logits import COUNTS, draw

from ride_timm import priors
from ride_timm.losses import make_loss


def test_ldam_is_cross_entropy_with_margins_and_deferred_weights():
    x, y = draw()
    weights = priors.effective_number_weights(COUNTS)
    ldam = make_loss("ldam", COUNTS, reweight_epoch=5)
    shifted = x.mean(1) - 30 * priors.ldam_margins(COUNTS) * F.one_hot(y, 10)
    torch.testing.assert_close(ldam(x, y), F.cross_entropy(shifted, y))
    ldam.set_epoch(5)
    torch.testing.assert_close(ldam(x, y), F.cross_entropy(shifted, y, weight=weights.double()))
    ldam.set_epoch(4)
    torch.testing.assert_close(ldam(x, y), F.cross_entropy(shifted, y))

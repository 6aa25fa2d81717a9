"""BalPoE, against its formula and its theory."""

import pytest
import torch
from expert_logits import COUNTS, adjusted_cross_entropy, assert_same_with_gradients, draw, prior
from torch.autograd import grad

from ride_timm.losses import make_loss


@pytest.mark.parametrize("taus", [(1.0,), (0.0, 2.0), (0.0, 1.0, 2.0), (-0.5, 1.0, 2.5), (0.25, 0.75, 1.25, 1.75)])
def test_balpoe_adjusts_each_expert_by_its_tau(taus):
    x, y = draw(E=len(taus))
    expected = sum(adjusted_cross_entropy(x[:, e], y, tau * prior().log()) for e, tau in enumerate(taus)) / len(taus)
    assert_same_with_gradients(make_loss("balpoe", COUNTS, taus=taus)(x, y), expected, x)


@pytest.mark.parametrize("taus", [(0.0, 1.0, 2.0), (-0.5, 1.0, 2.5), (0.0, 2.0)])
def test_a_perfectly_trained_balpoe_averages_to_the_balanced_posterior(taus):
    """Logits that make every adjusted expert equal the training posterior have a mean that is the balanced one."""
    likelihood = torch.rand(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1  # p(x | c)
    balanced = (likelihood / likelihood.sum()).log()
    training = (likelihood * prior() / (likelihood * prior()).sum()).log()
    logits = torch.stack([training - tau * prior().log() for tau in taus])[None]  # [1, E, C]
    torch.testing.assert_close(logits.mean(1)[0].log_softmax(0), balanced)
    logits.requires_grad_()
    loss = make_loss("balpoe", COUNTS, taus=taus)
    mean = sum(training[c].exp() * loss(logits, torch.tensor([c])) for c in range(10))  # over the training posterior
    assert grad(mean, logits)[0].abs().max() < 1e-6  # they minimise the expected loss

"""Focal loss, against its formula."""

import torch
from expert_logits import COUNTS, draw

from ride_timm.losses import make_loss


def test_class_balanced_focal_is_the_focal_loss_weighted_by_effective_numbers():
    x, y = draw()
    n = torch.tensor(COUNTS, dtype=torch.float64)
    weights = (1 - 0.9999) / (1 - 0.9999**n)
    p = x.mean(1).softmax(-1)[torch.arange(len(y)), y]
    expected = (weights[y] * (1 - p) ** 2 * -p.log()).sum() / weights[y].sum()
    value = make_loss("cb_focal", COUNTS, gamma=2.0)(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    unweighted = make_loss("cb_focal", COUNTS, gamma=0)(x, y)
    torch.testing.assert_close(unweighted, make_loss("cb_ce", COUNTS)(x, y))

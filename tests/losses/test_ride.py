"""RIDE's loss, against a loop over samples, experts and classes."""

import pytest
import torch
from expert_logits import COUNTS, draw

from ride_timm.losses.ride import RideLoss


def ride_by_hand(x, y, counts, factor, max_m=0.5, s=30.0, T0=1.0, r=0.05, reweighting=True, base_factor=1.0):
    """RIDE's loss with a loop for every sum."""
    n = torch.tensor(counts, dtype=torch.float64)
    B, E, C = x.shape
    margin = n**-0.25 * max_m / (n**-0.25).max()
    weights = (1 - 0.9999) / (1 - 0.9999**n)
    weights = weights / weights.sum() * C if reweighting else torch.ones(C, dtype=torch.float64)
    t = C * n / n.sum() * r + 1 - r
    T = T0 * t / t.max() if reweighting else torch.full((C,), T0, dtype=torch.float64)
    total = 0.0
    for e in range(E):
        base, kl = 0.0, 0.0
        for b in range(B):
            z = (x[b].mean(0) if factor == 0 else x[b, e]).clone()
            z[y[b]] = z[y[b]] - s * margin[y[b]]
            base = base - weights[y[b]] * z.log_softmax(0)[y[b]]
            p = (x[b].mean(0).detach() / T).softmax(0)
            kl = kl + (p * (p.log() - (x[b, e] / T).log_softmax(0))).sum()
        total = total + base_factor * base / weights[y].sum() + factor * T.mean() ** 2 * kl / B
    return total


@pytest.mark.parametrize("factor", [-0.45, 0.0, 0.3])
@pytest.mark.parametrize("reweighting", [False, True])
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_ride_equals_brute_force(factor, reweighting, num_experts):
    x, y = draw(E=num_experts)
    knobs = {"max_margin": 0.4, "s": 20.0, "base_loss_factor": 0.7}
    loss = RideLoss(
        COUNTS,
        additional_diversity_factor=factor,
        base_diversity_temperature=1.5,
        reweight_epoch=3,
        reweight_factor=0.02,
        **knobs,
    )
    loss.set_epoch(3 if reweighting else 2)
    expected = ride_by_hand(x, y, COUNTS, factor, 0.4, 20.0, 1.5, 0.02, reweighting, 0.7)
    value = loss(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    ours, theirs = torch.autograd.grad(value, x)[0], torch.autograd.grad(expected, x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kwargs", [{"reweight_epoch": -1}, {"reweight": False, "reweight_epoch": 2}])
def test_reweighting_that_is_off_stays_off(kwargs):
    x, y = draw()
    loss = RideLoss(COUNTS, **kwargs)
    first = loss(x, y)
    loss.set_epoch(1000)
    assert torch.equal(loss(x, y), first)
    torch.testing.assert_close(first, ride_by_hand(x, y, COUNTS, -0.45, reweighting=False))


def test_reweighting_from_the_first_epoch():
    x, y = draw()
    loss = RideLoss(COUNTS, reweight_epoch=0)
    torch.testing.assert_close(loss(x, y), ride_by_hand(x, y, COUNTS, -0.45), rtol=1e-6, atol=0)

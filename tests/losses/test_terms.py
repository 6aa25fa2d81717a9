"""Terms of the losses, against closed forms and torch."""

import pytest
import torch
import torch.nn.functional as F
from expert_logits import COUNTS, draw, half_precision

from ride_timm import InputError, priors
from ride_timm.losses import terms


def test_diversity_vanishes_for_equal_experts_and_has_no_gradient_through_the_ensemble():
    x, _ = draw(E=1)
    T = priors.class_temperature(COUNTS)
    same = x.detach().expand(-1, 3, -1).clone().requires_grad_()
    value = terms.diversity(same, T)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    x, _ = draw(E=3)
    (gradient,) = torch.autograd.grad(terms.diversity(x, torch.ones(10)), x)
    p, q = x.mean(1, keepdim=True).softmax(-1), x.softmax(-1)
    torch.testing.assert_close(gradient, (q - p) / len(x))


def test_focal_closed_form():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    p = torch.tensor([0.5, 1 / (1 + torch.e**-2)])
    for gamma in (0.0, 0.5, 2.0):
        expected = ((1 - p) ** gamma * -p.log()).mean()
        torch.testing.assert_close(terms.focal(logits, torch.zeros(2, dtype=torch.long), gamma), expected)


def test_distillation_closed_form():
    student, teacher = draw(E=1)[0][:, 0], draw(E=1, seed=1)[0][:, 0]
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(terms.distillation(student, teacher, 2.0), expected)
    assert terms.distillation(student, student, 2.0).abs() < 1e-12
    terms.distillation(student, teacher, 2.0).backward()


def test_half_precision_distillation_and_routing_are_float32():
    x, y = half_precision(torch.bfloat16)
    assert terms.distillation(x.mean(1), x[:, 0].detach(), 1.5).dtype == torch.float32
    assert terms.router_loss(x[:, :2, 0], x, y, pos_weight=100.0).dtype == torch.float32


def test_router_targets_adjusted_cross_entropy():
    right, wrong, doubtful = [5.0, 0.0], [0.0, 3.0], [0.0, 7.0]
    cases = [
        ([wrong, right, right], [1.0, 0.0]),  # prefixes: wrong, right, right
        ([right, doubtful, right], [0.0, 1.0]),  # right, wrong, right
        ([wrong, wrong, wrong], [0.0, 0.0]),  # never right: more experts do not help
        ([right, wrong, doubtful], [0.0, 0.0]),  # right, right, wrong
        ([wrong, wrong, [20.0, 0.0]], [1.0, 1.0]),  # right only together
    ]
    x = torch.tensor([experts for experts, _ in cases])
    y = torch.zeros(len(cases), dtype=torch.long)
    assert terms.router_targets(x, y).tolist() == [wanted for _, wanted in cases]


def test_router_loss_equals_torch():
    x, y = draw(B=200, E=4, C=3)
    gates = torch.randn(200, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros(200, 3, dtype=torch.float64)
    for b in range(200):
        right = [bool(x[b, :i].mean(0).argmax() == y[b]) for i in range(1, 5)]
        for i in range(3):
            wanted[b, i] = float(not right[i] and any(right[i + 1 :]))
    assert 0 < wanted.mean() < 1
    per_gate = [
        F.binary_cross_entropy_with_logits(gates[:, i], wanted[:, i], pos_weight=torch.tensor(100.0)) for i in range(3)
    ]
    expected, value = sum(per_gate) / 3, terms.router_loss(gates, x, y, pos_weight=100)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, gates)[0], torch.autograd.grad(expected, gates)[0])
    assert torch.autograd.grad(terms.router_loss(gates, x, y, pos_weight=100), x, allow_unused=True) == (None,)


def test_a_router_needs_two_experts_and_fitting_gates():
    x, y = draw(E=1)
    with pytest.raises(InputError, match="at least 2 experts, the model has 1"):
        terms.router_loss(torch.zeros(7, 0), x, y, pos_weight=100)
    with pytest.raises(InputError, match=r"gate logits of shape \(7, 2\), got \(7, 3\)"):
        terms.router_loss(torch.zeros(7, 3), draw()[0], y, pos_weight=100)

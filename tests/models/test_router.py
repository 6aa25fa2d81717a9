import math

import pytest
import torch

from ride_timm.models import Router


def plain_gate(router: Router, i: int, features: list[list[float]], logits: list[list[float]]) -> float:
    """Compute the gate of one image in plain Python.

    w · [top-k(mean of experts 1…i), relu(A f / |f| + a)] + b, with
    features: E lists of D numbers; logits: E lists of C numbers.
    """
    num_classes = len(logits[0])
    mean = [sum(logits[e][c] for e in range(i + 1)) / (i + 1) for c in range(num_classes)]
    top = sorted(mean, reverse=True)[: router.top_choices_num]
    norm = math.sqrt(sum(value**2 for value in features[i]))
    hidden = []
    layer = router.hidden[i]
    for row, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True):
        hidden.append(max(0.0, sum(w * value / norm for w, value in zip(row, features[i], strict=True)) + bias))
    last = router.fc[0] if len(router.fc) == 1 else router.fc[i]
    return sum(w * v for w, v in zip(last.weight[0].tolist(), top + hidden, strict=True)) + last.bias.item()


@pytest.mark.parametrize("num_experts", [2, 3, 6])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("top_choices_num", [1, 4, 10])
def test_gates_follow_the_formula(num_experts, shared, top_choices_num):
    B, D, C = 5, 7, 10
    torch.manual_seed(num_experts)
    router = Router(num_experts, D, C, top_choices_num, shared).double()
    features = 3 * torch.randn(B, num_experts, D, dtype=torch.float64)
    logits = 9 * torch.randn(B, num_experts, C, dtype=torch.float64)
    gates = router(features, logits)
    assert gates.shape == (B, num_experts - 1)
    expected = [
        [plain_gate(router, i, features[b].tolist(), logits[b].tolist()) for i in range(num_experts - 1)]
        for b in range(B)
    ]
    torch.testing.assert_close(gates, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    for i in range(num_experts - 1):
        torch.testing.assert_close(router.gate(i, features[:, i], logits[:, : i + 1].mean(1)), gates[:, i])


def test_gates_ignore_later_experts_and_feature_norms():
    router = Router(4, 6, 8)
    features, logits = torch.randn(3, 4, 6), torch.randn(3, 4, 8)
    gates = router(features, logits)
    torch.testing.assert_close(router(5 * features, logits), gates)
    features[:, 2:], logits[:, 2:] = 0.5, -1.0
    torch.testing.assert_close(router(features, logits)[:, :2], gates[:, :2])


def test_gates_ignore_the_order_of_classes():
    router, logits, features = Router(3, 6, 8), torch.randn(4, 3, 8), torch.randn(4, 3, 6)
    order = torch.randperm(8)
    torch.testing.assert_close(router(features, logits[:, :, order]), router(features, logits))


def test_every_parameter_gets_a_gradient():
    for shared in (True, False):
        torch.manual_seed(0)
        router = Router(3, 48, 40, 30, shared)
        router(torch.randn(16, 3, 48), torch.randn(16, 3, 40)).sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


def test_layer_sizes():
    router = Router(3, 48, 100, 30)
    assert [layer.weight.shape for layer in router.hidden] == [(16, 48), (16, 48)]
    assert [layer.weight.shape for layer in router.fc] == [(1, 46)]


def test_features_of_zero_give_a_finite_gate():
    assert torch.isfinite(Router(2, 4, 5)(torch.zeros(2, 2, 4), torch.zeros(2, 2, 5))).all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_experts=1: a router needs at least 2"):
        Router(1, 8, 10)
    with pytest.raises(ValueError, match="top_choices_num=0"):
        Router(2, 8, 10, 0)
    with pytest.warns(UserWarning, match="top_choices_num=11 is above the number of classes: using 10"):
        assert Router(2, 8, 10, 11).top_choices_num == 10


def test_resized_is_of_the_same_kind():
    router = Router(4, 8, 10, 6, False, 5).resized(12, 4)
    assert (router.num_experts, router.top_choices_num, len(router.fc)) == (4, 4, 3)
    assert router(torch.randn(2, 4, 12), torch.randn(2, 4, 4)).shape == (2, 3)
    assert router.hidden[0].weight.shape == (5, 12)

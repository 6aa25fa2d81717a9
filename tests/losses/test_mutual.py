"""Mutual learning, against its formula in loops; the running accuracy over batches and processes."""

import sys

import pytest
import torch
import torch.distributed as dist
from expert_logits import COUNTS, adjusted_cross_entropy, assert_same_with_gradients, draw, prior
from two_ranks import run_two_ranks

from ride_timm import InputError
from ride_timm.losses import make_loss
from ride_timm.losses.mutual import MOMENTUM
from ride_timm.training.recipe import Recipe

TAUS = (0.9, 1.0, 1.1)


def taught(x, y, weights, gate):
    """Mean over images and ordered pairs of experts of KL(i || j), in explicit loops."""
    B, E, _ = x.shape
    adjusted = [x[:, e] + tau * prior().log() for e, tau in enumerate(TAUS)]
    total = 0.0
    for b in range(B):
        for i in range(E):
            p = adjusted[i][b].softmax(0).detach()
            if gate and p.argmax() != y[b]:
                continue
            for j in range(E):
                if i != j:
                    q = adjusted[j][b].softmax(0)
                    total = total + weights[y[b]] * (p * (p / q).log()).sum() / (E * (E - 1))
    return total / B


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_mutual_learning_is_its_formula(gate, strength):
    x, y = draw(seed=5)
    with torch.no_grad():  # experts 1 and 2 are right about the first images, so that there is something to teach
        x[:4, :2].scatter_add_(2, y[:4, None, None].expand(-1, 2, 1), torch.full((4, 2, 1), 40.0, dtype=x.dtype))
    loss = make_loss("mutual", COUNTS, mutual=strength, mutual_gate=gate).eval()
    loss.accuracy.copy_(torch.linspace(0.9, 0.0, 10))
    weights = (1 - loss.accuracy.double()).sqrt() if gate else torch.ones(10, dtype=torch.float64)
    weights = weights / weights.mean()
    base = sum(adjusted_cross_entropy(x[:, e], y, tau * prior().log()) for e, tau in enumerate(TAUS)) / 3
    assert_same_with_gradients(loss(x, y), base + strength * taught(x, y, weights, gate), x, rtol=1e-4, atol=1e-7)


def test_the_running_accuracy_moves_for_the_classes_of_a_batch_in_training_only():
    loss = make_loss("mutual", COUNTS)
    x = torch.zeros(3, 3, 10)
    y = torch.tensor([2, 2, 5])
    x[0, :, 2] = x[1, 0, 2] = 100.0  # of class 2, four of six predictions are right
    x[1, 1:, 0] = x[2, :, 0] = 100.0
    loss.eval()(x, y)
    assert loss.accuracy.sum() == 0
    loss.train()(x, y)
    expected = torch.zeros(10)
    expected[2] = MOMENTUM * 4 / 6
    torch.testing.assert_close(loss.accuracy, expected)
    loss(x, y)
    torch.testing.assert_close(loss.accuracy[2], torch.tensor(MOMENTUM * 4 / 6 * (2 - MOMENTUM)))
    assert loss.hardness.mean().item() == pytest.approx(1) and loss.hardness[2] < loss.hardness[5]


def test_perfect_classes_are_taught_nothing_and_nothing_is_nan():
    loss = make_loss("mutual", COUNTS).eval()
    loss.accuracy.fill_(1.0)
    x, y = draw()
    assert torch.isfinite(loss(x, y)) and loss.hardness.sum() == 0


def test_the_running_accuracy_is_state():
    loss, other = make_loss("mutual", COUNTS), make_loss("mutual", COUNTS)
    loss.accuracy.fill_(0.25)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.accuracy, loss.accuracy) and list(loss.state_dict()) == ["accuracy"]


def test_one_expert_has_nobody_to_learn_from():
    with pytest.raises(InputError, match="loss=mutual needs at least 2 experts"):
        Recipe(loss="mutual", num_experts=1)


def test_two_processes_follow_all_images(tmp_path):
    run_two_ranks(__file__, tmp_path / "accuracy")
    loss = make_loss("mutual", COUNTS).train()
    loss(*draw(B=8))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"accuracy{rank}"), loss.accuracy)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = draw(B=8)
    loss = make_loss("mutual", COUNTS).train()
    loss(x[rank::2], y[rank::2])
    torch.save(loss.accuracy, f"{sys.argv[1]}{rank}")

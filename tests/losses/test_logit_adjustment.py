"""Logit adjustment and balanced softmax, against loops over samples and classes."""

import pytest
import torch
from expert_logits import COUNTS, adjusted_cross_entropy, assert_same_with_gradients, draw, prior

from ride_timm.losses import make_loss


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize(
    ("name", "kwargs", "offsets"),
    [
        ("balanced_softmax", {}, prior().log()),
        ("balanced_softmax", {}, torch.tensor(COUNTS, dtype=torch.float64).log()),  # counts for frequencies: the same
        ("logit_adjustment", {"tau": 1.5}, 1.5 * prior().log()),
        ("logit_adjustment", {"tau": 0.0}, torch.zeros(10, dtype=torch.float64)),
    ],
)
def test_adjustment_of_the_mean_logits_equals_brute_force(name, kwargs, offsets, num_experts):
    x, y = draw(E=num_experts)
    assert_same_with_gradients(
        make_loss(name, COUNTS, **kwargs)(x, y), adjusted_cross_entropy(x.mean(1), y, offsets), x
    )

"""SADE, against its formula."""

import torch
from expert_logits import COUNTS, adjusted_cross_entropy, assert_same_with_gradients, draw, prior

from ride_timm.losses import make_loss


def test_sade_trains_three_experts_for_three_distributions():
    x, y = draw()
    pi, flipped = prior(), prior().flip(0)  # the counts fall: the opposite order is the reverse
    offsets = [torch.zeros(10, dtype=torch.float64), pi.log(), pi.log() - 2 * flipped.log()]
    assert_same_with_gradients(
        make_loss("sade", COUNTS)(x, y), sum(adjusted_cross_entropy(x[:, e], y, offsets[e]) for e in range(3)), x
    )
    milder = make_loss("sade", COUNTS, inverse_tau=1.0)(x, y)
    offsets[2] = pi.log() - flipped.log()
    assert_same_with_gradients(milder, sum(adjusted_cross_entropy(x[:, e], y, offsets[e]) for e in range(3)), x)

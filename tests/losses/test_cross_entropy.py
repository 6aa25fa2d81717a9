"""Cross entropy, against torch and timm."""

import pytest
import torch
import torch.nn.functional as F
from expert_logits import COUNTS, draw
from timm.loss import LabelSmoothingCrossEntropy

from ride_timm import priors
from ride_timm.losses import make_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_equals_timm(smoothing):
    x, y = draw()
    expected = LabelSmoothingCrossEntropy(smoothing)(x.mean(1), y)
    torch.testing.assert_close(make_loss("ce", label_smoothing=smoothing)(x, y), expected)


def test_class_balanced_cross_entropy_equals_torch():
    x, y = draw()
    weights = priors.effective_number_weights(COUNTS)
    expected = F.cross_entropy(x.mean(1), y, weight=weights.double())
    torch.testing.assert_close(make_loss("cb_ce", COUNTS)(x, y), expected)

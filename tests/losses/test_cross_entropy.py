"""Cross entropy, against torch and timm."""

import pytest
import torch
import torch.nn.functional as F
from expert_logits import COUNTS, draw
from timm.loss import LabelSmoothingCrossEntropy

from ride_timm import priors
from ride_timm.losses import LOSSES, make_loss


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


WEIGHTS = [3.0, 0.5, 1.0, 2.0, 4.0, 0.25, 1.5, 1.0, 9.0, 0.1]


@pytest.mark.parametrize(
    ("loss", "keys", "offset"),
    [
        ("ce", {}, 0.0),
        ("focal", dict(gamma=0.0), 0.0),
        ("balanced_softmax", {}, priors.log_prior(COUNTS)),
        ("logit_adjustment", dict(tau=0.5), 0.5 * priors.log_prior(COUNTS)),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_class_weights_equal_those_of_torch_at_any_scale(loss, keys, offset, scale):
    x, y = draw()
    weights = WEIGHTS[: len(COUNTS)]
    expected = F.cross_entropy(x.mean(1) + offset, y, weight=torch.tensor(weights, dtype=x.dtype))
    made = make_loss(loss, COUNTS, weights=[scale * w for w in weights], **keys)
    torch.testing.assert_close(made(x, y), expected)


@pytest.mark.parametrize("loss", ["sade", "balpoe"])
def test_class_weights_act_on_each_expert(loss):
    x, y = draw()
    weights = WEIGHTS[: len(COUNTS)]
    made = make_loss(loss, COUNTS, weights=weights)
    adjusted, weight = x + made.offsets, torch.tensor(weights, dtype=x.dtype)
    each = [F.cross_entropy(adjusted[:, e], y, weight=weight) for e in range(3)]
    torch.testing.assert_close(made(x, y), sum(each) / (3 if loss == "balpoe" else 1))


def test_losses_with_weights_of_their_own_take_none():
    takers = {name for name, entry in LOSSES.items() if entry.takes_weights}
    assert takers == {"ce", "focal", "logit_adjustment", "balanced_softmax", "sade", "balpoe", "mdcs", "mutual"}

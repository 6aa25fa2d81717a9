"""MDCS, against its formula."""

import pytest
import torch
from expert_logits import COUNTS, adjusted_cross_entropy, draw, prior
from torch.autograd import grad

from ride_timm import InputError
from ride_timm.losses import make_loss


@pytest.mark.parametrize("epoch", [0, 7, 19, 300])
def test_mdcs_teaches_the_strong_view_what_the_weak_one_is_right_about(epoch):
    weak, y = draw(seed=5)
    strong, _ = draw(seed=6)
    with torch.no_grad():  # the first four images are right for experts 0 and 1, no image is right for expert 2
        weak[:4].scatter_add_(2, y[:4, None, None].expand(-1, 3, 1), torch.full((4, 3, 1), 40.0, dtype=torch.float64))
        weak[:, 2].scatter_(1, y[:, None], -60.0)
    taus, total = (-0.5, 1.0, 2.5), 0.0
    for e, tau in enumerate(taus):
        a, kl = tau * prior().log(), []
        for b in range(len(y)):
            p, q = (weak[b, e] + a).softmax(0).detach(), (strong[b, e] + a).softmax(0)
            if p.argmax() == y[b]:
                kl.append((p * (p / q).log()).sum())
        assert (len(kl) == 0) == (e == 2) and len(kl) < len(y)
        both = adjusted_cross_entropy(torch.cat([weak, strong])[:, e], torch.cat([y, y]), a)
        total = total + both + 0.6 * min((epoch + 1) / 20, 1) * (sum(kl) / len(kl) if kl else 0.0)
    loss = make_loss("mdcs", COUNTS)
    loss.set_epoch(epoch)
    value = loss(torch.cat([weak, strong]), y)
    torch.testing.assert_close(value, total, rtol=1e-6, atol=0)
    for view in (weak, strong):
        ours, theirs = (grad(which, view, retain_graph=True)[0] for which in (value, total))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_mdcs_needs_two_views():
    x, y = draw()
    with pytest.raises(InputError, match="expected the logits of two views of 7 images, got 7"):
        make_loss("mdcs", COUNTS)(x, y)

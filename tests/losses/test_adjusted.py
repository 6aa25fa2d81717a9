"""Losses that adjust logits by the prior, against loops over samples, experts and classes, and against their theory."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from ride_timm import InputError, priors
from ride_timm.losses import make_loss

COUNTS = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]


def draw(B=7, E=3, C=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    expert_logits = 5 * torch.randn(B, E, C, generator=generator, dtype=torch.float64)
    return expert_logits.requires_grad_(), torch.randint(0, C, (B,), generator=generator)


def by_hand(x, y, offsets):
    """Mean over samples of -log(e^(z_y + a_y) / sum_c e^(z_c + a_c)), a loop for every sum."""
    total = 0.0
    for b in range(len(x)):
        terms = [torch.exp(x[b, c] + offsets[c]) for c in range(x.shape[1])]
        total = total - torch.log(terms[int(y[b])] / sum(terms))
    return total / len(x)


def same_with_gradients(value, expected, x):
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad(value, x)[0], grad(expected, x)[0], rtol=1e-5, atol=1e-8)


def prior():
    n = torch.tensor(COUNTS, dtype=torch.float64)
    return n / n.sum()


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
    same_with_gradients(make_loss(name, COUNTS, **kwargs)(x, y), by_hand(x.mean(1), y, offsets), x)


def test_sade_trains_three_experts_for_three_distributions():
    x, y = draw()
    pi, flipped = prior(), prior().flip(0)  # the counts fall: the opposite order is the reverse
    offsets = [torch.zeros(10, dtype=torch.float64), pi.log(), pi.log() - 2 * flipped.log()]
    same_with_gradients(make_loss("sade", COUNTS)(x, y), sum(by_hand(x[:, e], y, offsets[e]) for e in range(3)), x)
    milder = make_loss("sade", COUNTS, inverse_tau=1.0)(x, y)
    offsets[2] = pi.log() - flipped.log()
    same_with_gradients(milder, sum(by_hand(x[:, e], y, offsets[e]) for e in range(3)), x)


@pytest.mark.parametrize("taus", [(1.0,), (0.0, 2.0), (0.0, 1.0, 2.0), (-0.5, 1.0, 2.5), (0.25, 0.75, 1.25, 1.75)])
def test_balpoe_adjusts_each_expert_by_its_tau(taus):
    x, y = draw(E=len(taus))
    expected = sum(by_hand(x[:, e], y, tau * prior().log()) for e, tau in enumerate(taus)) / len(taus)
    same_with_gradients(make_loss("balpoe", COUNTS, taus=taus)(x, y), expected, x)


@pytest.mark.parametrize("taus", [(0.0, 1.0, 2.0), (-0.5, 1.0, 2.5), (0.0, 2.0)])
def test_a_perfectly_trained_balpoe_averages_to_the_balanced_posterior(taus):
    """Logits that make every adjusted expert equal the training posterior have a mean that is the balanced one."""
    likelihood = torch.rand(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1  # p(x | c)
    balanced = (likelihood / likelihood.sum()).log()
    training = (likelihood * prior() / (likelihood * prior()).sum()).log()
    logits = torch.stack([training - tau * prior().log() for tau in taus])[None]  # [1, E, C]
    torch.testing.assert_close(logits.mean(1)[0].log_softmax(0), balanced)
    logits.requires_grad_()
    loss = make_loss("balpoe", COUNTS, taus=taus)
    mean = sum(training[c].exp() * loss(logits, torch.tensor([c])) for c in range(10))  # over the training posterior
    assert grad(mean, logits)[0].abs().max() < 1e-6  # they minimise the expected loss


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
        both = by_hand(torch.cat([weak, strong])[:, e], torch.cat([y, y]), a)
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


def test_the_inverse_prior_follows_ranks_not_positions():
    counts = [5, 80, 20]
    torch.testing.assert_close(priors.inverse_log_prior(counts), torch.tensor([80.0, 5.0, 20.0]).div(105).log())
    ties = priors.inverse_log_prior([7, 7, 1])  # the first of two equals counts as the rarer
    torch.testing.assert_close(ties, torch.tensor([7.0, 1.0, 7.0]).div(15).log())


@pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjustment", "sade", "balpoe"])
def test_smoothed_labels_and_half_precision(name):
    x, y = draw()
    loss = make_loss(name, COUNTS, label_smoothing=0.2)
    offsets = {"sade": lambda: loss.offsets, "balpoe": lambda: loss.offsets}.get(name, lambda: loss.offset[None])()
    logits = x.mean(1, keepdim=True) if len(offsets) == 1 else x
    each = [F.cross_entropy(logits[:, e] + offsets[e], y, label_smoothing=0.2) for e in range(len(offsets))]
    torch.testing.assert_close(loss(x, y), sum(each) / (3 if name == "balpoe" else 1))
    half = x.detach().bfloat16()
    assert loss(half, y).dtype == torch.float32 and torch.equal(loss(half, y), loss(half.float(), y))


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("logit_adjustment", {"tau": -1}, "tau must be at least 0, got -1"),
        ("logit_adjustment", {"tau": float("nan")}, "tau must be at least 0, got nan"),
        ("balanced_softmax", {"tau": 2}, "does not take tau; it takes: label_smoothing"),
        ("sade", {"inverse_tau": -2}, "inverse_tau must be at least 0, got -2"),
        ("balpoe", {"taus": (0, 1)}, "taus 0, 1 have a mean of 0.5: expected 1"),
        ("balpoe", {"taus": ()}, r"taus \(none\) have a mean of nan"),
        ("mdcs", {"taus": (0, 1, 3)}, "have a mean of 1.33333: expected 1"),
        ("mdcs", {"consistency": -1}, "consistency must be at least 0, got -1"),
        ("balpoe", {"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1"),
    ],
)
def test_bad_arguments_are_named(name, kwargs, match):
    with pytest.raises(InputError, match=match):
        make_loss(name, COUNTS, **kwargs)


@pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjustment", "sade", "balpoe", "mdcs"])
def test_a_prior_needs_counts_of_every_class(name):
    with pytest.raises(InputError, match=f"loss '{name}' needs class counts"):
        make_loss(name)
    with pytest.raises(InputError, match="class 1 has 0 images"):
        make_loss(name, [5, 0, 1])


@pytest.mark.parametrize("name", ["sade", "balpoe"])
def test_another_number_of_experts_is_refused(name):
    x, y = draw(E=2)
    with pytest.raises(InputError, match="this loss trains 3 experts, the model has 2"):
        make_loss(name, COUNTS)(x, y)

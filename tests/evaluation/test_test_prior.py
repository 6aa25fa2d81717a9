"""Test priors: named ones, and maximum likelihood against closed forms."""

import pytest
import torch

from ride_timm.errors import InputError
from ride_timm.evaluation.test_prior import estimate_log_prior, log_prior_of


def test_named_priors_are_distributions(tmp_path):
    names = ("cat", "dog", "newt")
    (tmp_path / "prior.csv").write_text("newt,1\ncat,3\ndog,0\n")
    for text, expected in (
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("train", [0.6, 0.3, 0.1]),
        (str(tmp_path / "prior.csv"), [0.75, 0, 0.25]),
    ):
        torch.testing.assert_close(log_prior_of(text, [6, 3, 1], names).exp(), torch.tensor(expected))


def test_priors_that_cannot_be_known(tmp_path):
    with pytest.raises(InputError, match="has no class counts"):
        log_prior_of("train", None, ("cat", "dog"))
    (tmp_path / "zeros.txt").write_text("0\n0\n")
    with pytest.raises(InputError, match="expected a class with a probability above 0"):
        log_prior_of(str(tmp_path / "zeros.txt"), None, ("cat", "dog"))


@pytest.mark.parametrize("model_prior", [[0.5, 0.5], [0.9, 0.1]])
@pytest.mark.parametrize("ones", [330, 500, 620])
def test_the_estimate_of_two_classes_is_that_of_maximum_likelihood(model_prior, ones):
    # x is 1 with probability 0.8 in class 0 and 0.3 in class 1: q = (f - 0.3) / (0.8 - 0.3) for a fraction f of ones
    likelihood = torch.tensor([[0.8, 0.3], [0.2, 0.7]], dtype=torch.float64)
    log_model_prior = torch.tensor(model_prior, dtype=torch.float64).log()
    images = torch.tensor([0] * ones + [1] * (1000 - ones))
    logits = likelihood[images].log() + log_model_prior + 5.0  # any constant
    found = estimate_log_prior(logits, log_model_prior, shrinkage=0, tolerance=1e-12).exp()
    q = (ones / 1000 - 0.3) / 0.5
    torch.testing.assert_close(found, torch.tensor([q, 1 - q], dtype=torch.float64), rtol=0, atol=1e-8)


def test_an_estimate_beyond_the_mixtures_ends_at_its_border():
    likelihood = torch.tensor([[0.8, 0.3], [0.2, 0.7]])
    logits = likelihood[torch.tensor([0] * 95 + [1] * 5)].log()  # more ones than even class 0 has
    found = estimate_log_prior(logits, torch.tensor([0.5, 0.5]).log(), shrinkage=0).exp()
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.25, 0.5])
@pytest.mark.parametrize("ones", [400, 950])
def test_the_shrunken_estimate_maximises_the_posterior(shrinkage, ones):
    likelihood = torch.tensor([[0.8, 0.3], [0.2, 0.7]], dtype=torch.float64)
    logits = likelihood[torch.tensor([0] * ones + [1] * (1000 - ones))].log()
    found = estimate_log_prior(logits, torch.tensor([0.5, 0.5]).log(), shrinkage, tolerance=1e-12).exp()
    q = torch.linspace(0.0005, 0.9995, 9991, dtype=torch.float64)
    evidence = q[:, None] * likelihood[:, 0] + (1 - q)[:, None] * likelihood[:, 1]  # of both values of x
    images = (evidence.log() * torch.tensor([ones / 1000, 1 - ones / 1000])).sum(1)
    posterior = (1 - shrinkage) * images + shrinkage / 2 * (q.log() + (1 - q).log())
    assert found[0].item() == pytest.approx(q[posterior.argmax()].item(), abs=2e-4)
    assert found.sum().item() == pytest.approx(1)


def test_calibrated_logits_give_the_prior_of_the_sample_back():
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(5, 3, generator=generator, dtype=torch.float64)
    prior = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02], dtype=torch.float64)
    targets = torch.multinomial(prior, 20_000, replacement=True, generator=generator)
    x = means[targets] + torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    uniform = torch.full((5,), 0.2, dtype=torch.float64).log()
    logits = x @ means.T - (means**2).sum(1) / 2  # of Gaussian classes, equally frequent
    found = estimate_log_prior(logits, uniform, shrinkage=0)
    torch.testing.assert_close(found.exp(), prior, rtol=0, atol=0.01)
    right = [(z.argmax(1) == targets).double().mean() for z in (logits, logits + found - uniform)]
    assert right[1] > right[0]

import pytest
import torch

from ride_timm import priors
from ride_timm.errors import InputError

COUNTS = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]


def test_effective_number_weights_match_their_closed_form_and_sum_to_the_number_of_classes():
    expected = torch.tensor([(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS], dtype=torch.float64)
    expected *= len(COUNTS) / expected.sum()
    weights = priors.effective_number_weights(COUNTS)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.sum(), torch.tensor(10.0), rtol=1e-6, atol=0)


def test_effective_number_weights_approach_uniform_and_inverse_frequency():
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    torch.testing.assert_close(priors.effective_number_weights(COUNTS, beta=1e-9), torch.ones(10))
    inverse = (1 / counts * 10 / (1 / counts).sum()).float()
    torch.testing.assert_close(priors.effective_number_weights(COUNTS, beta=1 - 1e-9), inverse, rtol=1e-4, atol=0)


def test_inverse_root_weights_match_their_closed_form():
    torch.testing.assert_close(priors.inverse_root_weights([4, 16, 1]), torch.tensor([0.5, 0.25, 1.0]) * 3 / 1.75)


def test_ldam_margins_reach_the_maximum_at_the_rarest_class():
    margins = priors.ldam_margins([16, 1, 81], max_margin=0.5)
    torch.testing.assert_close(margins, torch.tensor([0.25, 0.5, 0.5 / 3]))
    torch.testing.assert_close(priors.ldam_margins([7, 7], max_margin=0.4), torch.tensor([0.4, 0.4]))


def test_class_temperature_matches_its_closed_form():
    # C n / N = [1.5, 0.5]; r = 0.2 -> [1.1, 0.9] / 1.1
    temperature = priors.class_temperature([30, 10], base=2.0, reweight_factor=0.2)
    torch.testing.assert_close(temperature, torch.tensor([2.0, 2.0 * 0.9 / 1.1]))
    torch.testing.assert_close(priors.class_temperature([30, 10], reweight_factor=0.0), torch.ones(2))


def test_log_prior_is_a_distribution():
    prior = priors.log_prior([3, 1])
    torch.testing.assert_close(prior.exp(), torch.tensor([0.75, 0.25]))


def test_shot_groups_partition_the_classes_at_the_authors_bounds():
    groups = priors.shot_groups([101, 100, 20, 19, 0])
    assert groups["many"].tolist() == [True, False, False, False, False]
    assert groups["medium"].tolist() == [False, True, True, False, False]
    assert groups["few"].tolist() == [False, False, False, True, True]
    counts = torch.randint(0, 300, (1000,))
    assert (torch.stack(list(priors.shot_groups(counts).values())).sum(0) == 1).all()
    assert [g.sum().item() for g in priors.shot_groups(counts, many=9, few=10).values()][1] == 0


def test_the_inverse_prior_follows_ranks_not_positions():
    counts = [5, 80, 20]
    torch.testing.assert_close(priors.inverse_log_prior(counts), torch.tensor([80.0, 5.0, 20.0]).div(105).log())
    ties = priors.inverse_log_prior([7, 7, 1])  # the first of two equals counts as the rarer
    torch.testing.assert_close(ties, torch.tensor([7.0, 1.0, 7.0]).div(15).log())


@pytest.mark.parametrize(
    "counts, match",
    [
        ([3, 0, 2, 0], r"class 1 has 0 images, expected an integer of at least 1 \(2 such classes\)"),
        ([3, -1], "class 1 has -1 images"),
        ([3, 2.5], "class 1 has 2.5 images"),
        ([3, float("nan")], "class 1 has nan images"),
        ([], "one number per class"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (["a"], "sequence of integers"),
        (None, "sequence of integers"),
    ],
)
@pytest.mark.parametrize(
    "prior", [priors.effective_number_weights, priors.ldam_margins, priors.class_temperature, priors.log_prior]
)
def test_bad_counts_are_named(prior, counts, match):
    with pytest.raises(InputError, match=match):
        prior(counts)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match=r"beta must lie between 0 and 1, got 1\.0"):
        priors.effective_number_weights(COUNTS, beta=1.0)
    with pytest.raises(InputError, match=r"reweight_factor 1\.5 below 1"):
        priors.class_temperature(COUNTS, reweight_factor=1.5)
    with pytest.raises(InputError, match="few"):
        priors.shot_groups(COUNTS, many=10, few=20)

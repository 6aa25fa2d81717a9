"""The prior that a run's logits suit, against closed forms."""

import json

import pytest
import torch

from ride_timm.errors import InputError
from ride_timm.inference.model_prior import (
    model_log_prior,
    rebalanced_log_prior,
    run_results,
    stage_one_log_prior,
)
from ride_timm.priors import effective_number_weights, log_prior
from ride_timm.training.recipe import Recipe

COUNTS = [500, 100, 20, 5]
N = torch.tensor(COUNTS, dtype=torch.float32)
UNIFORM = torch.ones(4)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (dict(loss="ce"), N),
        (dict(loss="focal"), N),
        (dict(loss="ce", sampler="square_root"), N**0.5),
        (dict(loss="ce", sampler="class_balanced"), UNIFORM),
        (dict(loss="ce", sampler="progressive"), UNIFORM),  # in its last epoch
        (dict(loss="ce", sampler="progressive", epochs=None), UNIFORM),
        (dict(loss="cb_ce"), N * effective_number_weights(COUNTS)),
        (dict(loss="logit_adjustment", tau=0.5), N**0.5),
        (dict(loss="logit_adjustment", tau=2.0), 1 / N),
        (dict(loss="balanced_softmax"), UNIFORM),
        (dict(loss="balanced_softmax", sampler="class_balanced"), 1 / N),
        (dict(loss="balpoe"), UNIFORM),
        (dict(loss="sade"), (N * N.flip(0) ** 2) ** (1 / 3)),
        (dict(loss="ldam", reweight=False), N),
        (dict(loss="ldam"), N * effective_number_weights(COUNTS)),
        (dict(loss="ride", reweight_epoch=300), N),
        (dict(loss="ce", decouple="crt"), UNIFORM),
        (dict(loss="ce", decouple="logit_adjustment"), UNIFORM),
        (dict(loss="ce", decouple="logit_adjustment", decouple_tau=0.5), N**0.5),
    ],
)
def test_the_prior_follows_from_loss_and_sampler(keys, expected):
    found = rebalanced_log_prior(Recipe(**keys), COUNTS, stage_one_log_prior(Recipe(**keys), COUNTS)).exp()
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-5, atol=1e-7)


def test_cross_entropy_with_an_offset_learns_logits_for_the_prior_stated():
    # the minimiser of the expected loss over a discrete x, by gradient descent, is log p(x|y) + that prior
    likelihood = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])  # [x, y]
    counts = [60, 30, 10]
    joint = likelihood * (torch.tensor(counts) / 100)
    logits = torch.zeros(3, 3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = -(joint * (logits + 0.5 * log_prior(counts)).log_softmax(1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    prior = stage_one_log_prior(Recipe(loss="logit_adjustment", tau=0.5), counts)
    expected = (likelihood.log() + prior).softmax(1)
    torch.testing.assert_close(logits.detach().softmax(1), expected, rtol=0, atol=1e-3)


def test_the_prior_of_a_model_is_given_known_or_uniform(tmp_path, capsys):
    names = ("a", "b", "c", "d")
    (tmp_path / "recipe.yaml").write_text(Recipe(loss="ce").to_yaml())
    (tmp_path / "results.json").write_text(json.dumps(dict(stages={}, class_counts=COUNTS)))
    run = f"local-dir:{tmp_path}"
    assert run_results(run)["class_counts"] == COUNTS and run_results("resnet18") == {}
    torch.testing.assert_close(model_log_prior(None, run, COUNTS, names), log_prior(COUNTS))
    torch.testing.assert_close(model_log_prior("uniform", run, COUNTS, names).exp(), UNIFORM / 4)
    (tmp_path / "results.json").write_text(
        json.dumps(dict(stages={}, class_counts=COUNTS, class_weights=[1, 5, 25, 100]))
    )
    torch.testing.assert_close(model_log_prior(None, run, COUNTS, names).exp(), UNIFORM / 4)
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(model_log_prior(None, "resnet18", COUNTS, names).exp(), UNIFORM / 4)
    assert (
        "the experts of resnet18 were trained is not known here; their logits are taken to suit"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("keys", "epochs", "expected"),
    [
        (dict(loss="ldam"), 160, N),  # kept before re-weighting began
        (dict(loss="ldam"), 161, N * effective_number_weights(COUNTS)),
        (dict(loss="ce", sampler="progressive"), 1, N),
        (dict(loss="ce", sampler="progressive"), 200, UNIFORM),
    ],
)
def test_the_prior_is_that_of_the_epoch_kept(tmp_path, keys, epochs, expected):
    (tmp_path / "recipe.yaml").write_text(Recipe(**keys, select="best", holdout=0.1).to_yaml())
    stages = dict(experts=dict(epochs=epochs))
    (tmp_path / "results.json").write_text(json.dumps(dict(stages=stages, class_counts=COUNTS)))
    prior = model_log_prior(None, f"local-dir:{tmp_path}", COUNTS, ("a", "b", "c", "d"))
    torch.testing.assert_close(prior.exp(), expected / expected.sum(), rtol=1e-5, atol=1e-7)


def a_run(folder, recipe, stages, **facts):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    facts |= dict(class_counts=COUNTS, stages={stage: dict(epochs=1) for stage in stages})
    (folder / "results.json").write_text(json.dumps(facts))
    return str(folder)


def test_the_prior_of_experts_from_another_run_is_that_runs(tmp_path, capsys):
    def found(spec):
        return model_log_prior(None, spec, COUNTS, ("a", "b", "c", "d")).exp()

    weights = [1.0, 2.0, 3.0, 4.0]
    source = a_run(tmp_path / "source", Recipe(loss="ce"), ["experts"], class_weights=weights)
    weighted = N * torch.tensor(weights) / (N * torch.tensor(weights)).sum()
    torch.testing.assert_close(found(source), weighted)
    gate = a_run(tmp_path / "gate", Recipe(loss="balpoe"), ["router"], source=source)
    torch.testing.assert_close(found(gate), weighted)
    heads = Recipe(loss="ce", decouple="logit_adjustment")
    moved = a_run(tmp_path / "moved", heads, ["heads"], source=source)
    torch.testing.assert_close(found(moved), weighted / N / (weighted / N).sum(), rtol=1e-5, atol=1e-7)
    again = a_run(tmp_path / "again", Recipe(loss="ce"), ["router"], source=moved)
    torch.testing.assert_close(found(again), found(moved))
    assert capsys.readouterr().err == ""
    lost = a_run(tmp_path / "lost", Recipe(loss="ce"), ["router"], source="runs/gone")
    torch.testing.assert_close(found(lost), UNIFORM / 4)
    assert "is not known here" in capsys.readouterr().err


def test_the_prior_is_that_of_the_images_trained_on(tmp_path):
    spec = a_run(tmp_path / "run", Recipe(loss="ce", holdout=0.5), ["experts"], train_counts=[4, 3, 2, 1])
    found = model_log_prior(None, spec, COUNTS, ("a", "b", "c", "d")).exp()
    torch.testing.assert_close(found, torch.tensor([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize("text", ['{"class_counts": [', "", "[]", "3", "{}", '{"stages": 1}', "[" * 5000])
def test_damaged_results_are_bad_input(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json is (missing or )?damaged"):
        run_results(str(tmp_path))

"""The recipe, the threshold and the data that belong to a model."""

import json

import pytest

from ride_timm.errors import InputError
from ride_timm.inference.load import data_recipe, own_recipe, threshold_for
from ride_timm.training.recipe import load_recipe


@pytest.fixture
def release(tmp_path):
    """A release of a network trained on local images."""
    (tmp_path / "config.json").write_text(json.dumps(dict(sha256="0" * 64)))
    recipe = load_recipe("fashion_lt").override(dict(data_dir="/somewhere", threshold=0.3))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    return str(tmp_path)


def test_a_threshold_is_the_one_given_or_the_models_or_a_half(release):
    assert threshold_for(release, 0.7) == 0.7
    assert threshold_for(release, None) == threshold_for(f"local-dir:{release}", None) == 0.3  # no data needed
    assert threshold_for("ride_resnet32", None) == 0.5
    with pytest.raises(InputError, match=r"threshold=1\.5: expected a probability between 0 and 1"):
        threshold_for(release, 1.5)


def test_data_are_those_named_or_the_models_own_or_a_default(release):
    assert data_recipe("cifar10_lt", release, {}).dataset == "cifar10"
    assert data_recipe(None, "ride_resnet32", dict(dataset="cifar100")).name == "cifar100_lt"
    assert data_recipe(None, None, dict(dataset="my/images")).augment == "imagenet"
    with pytest.raises(InputError, match="no data set given: pass --dataset or --recipe"):
        data_recipe(None, "ride_resnet32", {})
    with pytest.raises(InputError, match="is of a release and names local files: pass --data-dir or --recipe"):
        data_recipe(None, release, {})
    assert own_recipe(release).threshold == 0.3 and own_recipe("ride_resnet32") is None


def test_a_runs_own_local_data_are_used(release, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert data_recipe(None, release, dict(threshold=0.4)).data_dir == "/somewhere"

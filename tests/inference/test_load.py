"""The recipe, the threshold and the data that belong to a model."""

import json
from types import SimpleNamespace

import pytest

from ride_timm.errors import InputError
from ride_timm.inference.load import data_recipe, input_policy, own_recipe, threshold_for
from ride_timm.training.recipe import Recipe, load_recipe


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
    with pytest.raises(InputError, match="names local files: pass --dataset, --data-dir or --recipe"):
        data_recipe(None, release, {})
    assert data_recipe(None, release, dict(data_dir="here")).data_dir == "here"
    assert own_recipe(release).threshold == 0.3 and own_recipe("ride_resnet32") is None


def test_another_data_set_takes_nothing_from_the_images_of_the_run(tmp_path):
    own = dict(dataset="my/set", data_dir="/old", dataset_config="a", label_column="kind", test_split="dev")
    recipe = load_recipe("cifar100_lt").override(own | dict(imb_factor=0.5, many_shot=50, workers=3))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    other = data_recipe(None, str(tmp_path), dict(dataset="other", label_column="label"))
    assert other.data_args == Recipe(dataset="other", label_column="label").data_args
    assert (other.many_shot, other.workers, other.augment) == (50, 3, "cifar")
    assert data_recipe(None, str(tmp_path), dict(dataset="my/set")).data_args == recipe.data_args


def test_an_epoch_selected_on_the_runs_validation_split_is_no_matter_of_other_data(tmp_path):
    recipe = load_recipe("imagenet_lt_resnet50").override(dict(use_val=True, select="best", patience=3))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert not data_recipe(None, str(tmp_path), dict(dataset="other")).use_val


@pytest.mark.parametrize("place", ["mini", "/gone/mini"])
def test_images_that_are_not_where_the_run_had_them_are_asked_for(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run := tmp_path / "run").mkdir()
    (run / "recipe.yaml").write_text(load_recipe("finetune").override(dict(dataset=place)).to_yaml())
    with pytest.raises(InputError, match=rf"run .* on the images in '{place}', which is not here: pass --dataset"):
        data_recipe(None, str(run), {})
    assert data_recipe(None, str(run), dict(dataset="cifar10")).dataset == "cifar10"
    (tmp_path / "mini").mkdir()
    if place == "mini":
        assert data_recipe(None, str(run), {}).dataset == place


def test_the_input_is_the_models_unless_it_is_stated(release):
    cfg = dict(input_size=(3, 96, 96), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9, interpolation="bicubic")
    model, recipe = SimpleNamespace(pretrained_cfg=cfg | dict(num_classes=3)), Recipe()
    policy = input_policy(model, recipe, "hf-hub:me/mine", stated=False)
    assert policy.data_config(policy.size) == cfg
    assert input_policy(model, recipe, "hf-hub:me/mine", stated=True) == recipe.policy
    assert input_policy(model, recipe, release, stated=False) == recipe.policy  # it has a recipe of its own


def test_a_runs_own_local_data_are_used(release, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert data_recipe(None, release, dict(threshold=0.4)).data_dir == "/somewhere"

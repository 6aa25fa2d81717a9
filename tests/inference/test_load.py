"""The recipe, the threshold and the data that belong to a model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ride_timm.data.image_set import ImageSet, LongTailData
from ride_timm.errors import InputError
from ride_timm.inference.load import data_recipe, in_model_order, input_policy, own_recipe, threshold_for
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


def data_of(*class_names):
    """Two training images of the first class, one of every other; a test image of each."""
    train, test = ([0, *range(len(class_names))], [*range(len(class_names))])
    sets = [ImageSet(None, np.arange(len(y)), np.array(y), "image", "s") for y in (train, test)]
    return LongTailData(*sets, class_names, "set")


def model_of(*label_names):
    return SimpleNamespace(num_classes=3, pretrained_cfg=dict(label_names=list(label_names)))


@pytest.mark.parametrize("names", [("a", "b", "c"), ("0", "1", "2"), ()])
@pytest.mark.parametrize("own", [("a", "b", "c"), ("0", "1", "2")])
def test_classes_named_alike_or_not_at_all_stay_as_they_are(names, own, capsys):
    data = data_of(*own)
    found = in_model_order(data, model_of(*names), "m")
    assert found.class_names == own and found.test.labels.tolist() == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_classes_in_another_order_take_the_models(capsys):
    data = in_model_order(data_of("a", "b", "c"), model_of("c", "a", "b"), "m")
    assert data.class_names == ("c", "a", "b") and data.class_counts == [1, 2, 1]
    assert data.train.labels.tolist() == [1, 1, 2, 0] and data.test.labels.tolist() == [1, 2, 0]
    assert capsys.readouterr().err == ""
    data = in_model_order(data_of("B b", "C", "a_a"), model_of("a/A", "b-b", "c"), "m")  # as folders spell them
    assert data.class_names == ("a_a", "B b", "C") and data.test.labels.tolist() == [1, 2, 0]


def test_classes_of_other_names_are_compared_by_number_unless_some_contradict(capsys):
    data = data_of("a", "b", "c")
    assert in_model_order(data, model_of("x", "b", "c"), "m") is data
    assert "by their numbers: m and the data name them differently, such as 'x' and 'a'" in capsys.readouterr().err
    with pytest.raises(InputError, match="class 'b' is number 2 of m and 1 of the data"):
        in_model_order(data, model_of("x", "c", "b"), "m")


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

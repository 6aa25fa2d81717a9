"""Recipes: reading, overriding, flags and errors."""

import argparse
import dataclasses

import pytest
import yaml

from ride_timm import InputError
from ride_timm.losses import make_loss
from ride_timm.recipe import Recipe, add_flags, available, flags_given, load_recipe


@pytest.mark.parametrize("name", available())
def test_shipped_recipes_read_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe
    make_loss(recipe.loss, [5, 3, 2], **recipe.loss_args)
    assert recipe.stage("experts").lr_at(0) <= recipe.lr


def test_epochs_alone_scale_decay_and_reweighting():
    recipe = load_recipe("cifar100_lt").override({"epochs": "40"})
    assert (recipe.decay_epochs, recipe.reweight_epoch, recipe.warmup_epochs) == ((32, 36), 32, 5)


def test_named_epochs_are_not_scaled():
    given = {"epochs": 40, "decay_epochs": ["10", "20"], "reweight_epoch": -1}
    recipe = load_recipe("cifar100_lt").override(given)
    assert (recipe.decay_epochs, recipe.reweight_epoch) == ((10, 20), -1)


def test_reweighting_off_reaches_the_loss():
    assert Recipe(reweight=False).loss_args["reweight_epoch"] == -1
    assert Recipe(reweight_epoch=7).loss_args["reweight_epoch"] == 7


def test_every_key_has_its_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    known = {action.dest for action in parser._actions}
    assert {item.name for item in dataclasses.fields(Recipe)} <= known
    args = parser.parse_args(["--decay-epochs", "3", "4", "--no-use-norm", "--lr", "5e-2", "--clip-grad", "none"])
    recipe = Recipe().override(flags_given(args))
    assert recipe.decay_epochs == (3, 4) and recipe.use_norm is False and recipe.lr == 0.05 and recipe.clip_grad is None
    assert flags_given(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "abc"}, r"lr='abc': expected a number"),
        ({"lr": 0}, r"lr=0: expected a number, above 0"),
        ({"lr": "nan"}, r"lr='nan': expected a number"),
        ({"epochs": 0}, r"epochs=0: expected a whole number, 1 or more"),
        ({"epochs": 1.5}, r"epochs=1.5: expected a whole number"),
        ({"batch_size": True}, r"batch_size=True: expected a whole number"),
        ({"num_experts": -1}, r"num_experts=-1: .* 1 or more"),
        ({"imb_factor": 100}, r"imb_factor=100: .* at most 1.*IF 100 for 0.01"),
        ({"imb_factor": 0}, r"imb_factor=0: .* above 0"),
        ({"use_norm": "yes"}, r"use_norm='yes': expected true or false"),
        ({"imb_type": "linear"}, r"imb_type='linear': expected one of exp, step, none"),
        ({"dataset": None}, r"dataset=None: a value is needed"),
        ({"dataset": 3}, r"dataset=3: expected a text"),
        ({"decay_epochs": ["x"]}, r"decay_epochs=\['x'\]: expected a whole number"),
        ({"select": "best"}, r"set --holdout"),
        ({"patience": 3}, r"set --holdout"),
        ({"teacher_mode": "train"}, r"needs distillation"),
    ],
)
def test_bad_values_name_key_value_and_expectation(values, message):
    with pytest.raises(InputError, match=message):
        Recipe(**values)


def test_unknown_recipe_lists_the_known(tmp_path):
    with pytest.raises(InputError, match=r"recipe 'nope': no such recipe or file; there are .*cifar100_lt"):
        load_recipe("nope")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 3\n", r"unknown key learning_rate; the keys are"),
        ("lr: [\n", r"not YAML"),
        ("- lr\n", r"expected `key: value` lines"),
    ],
)
def test_bad_recipe_files(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_differing_names_what_changes_numbers_only():
    recipe = Recipe()
    other = dataclasses.replace(recipe, lr=0.2, workers=7, data_dir="elsewhere", name="other")
    assert recipe.differing(other) == ["lr"]


def test_yaml_states_every_key():
    assert set(yaml.safe_load(Recipe().to_yaml())) == {item.name for item in dataclasses.fields(Recipe)}

"""Recipes, flags, annotation lists and numbers by class."""

import dataclasses
from contextlib import suppress

import numpy as np
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import ODD, damaged

from ride_timm import InputError
from ride_timm.data.lists import check_classes, read_list
from ride_timm.files import read_class_values
from ride_timm.training.options import parse_arguments
from ride_timm.training.recipe import Recipe, available, load_recipe

KEYS = [item.name for item in dataclasses.fields(Recipe)]
CHOICES = sorted({choice for item in dataclasses.fields(Recipe) for choice in item.metadata["choices"]})
VALUE = st.one_of(ODD, st.sampled_from(CHOICES), st.integers(0, 12), st.floats(0, 1))
SHIPPED = b"dataset: cifar100\nimb_factor: 0.01\nloss: ride\nepochs: 200\ndecay_epochs: [160, 180]\nlr: 1e-1\n"
LIST = "train/a/1.jpg 0\ntrain/a b/2.jpg 0\ntrain/b/1.jpg 1\ntrain/c/ü.jpg 2\n".encode()


def _use(recipe):
    """Everything that a run asks of a recipe before it reads data."""
    with suppress(InputError):
        recipe = recipe.for_images(100)
        _ = recipe.policy, recipe.num_views, recipe.data_args, recipe.model_args, recipe.loss_args, recipe.shots
        _ = [recipe.stage(name).lr_at(1) for name in ("experts", "router")]
        assert recipe.differing(recipe) == []


@given(values=st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), VALUE, max_size=5))
def test_recipes(values, tmp_path_factory, harmless):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with harmless(), suppress(InputError):
        recipe = load_recipe(path)
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(path) == recipe
        _use(recipe)


@given(data=st.one_of(st.binary(max_size=60), damaged(SHIPPED)))
def test_recipe_files(data, tmp_path_factory, harmless):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(data)
    with harmless(), suppress(InputError):
        _use(load_recipe(path))


FLAG = st.sampled_from([f"--{key.replace('_', '-')}" for key in KEYS if key not in ("dataset", "data_dir")])
OTHER = st.sampled_from(["--stage", "--from", "--teacher", "--output", "--resume", "--threads", "--no-use-norm"])


@given(
    recipe=st.sampled_from(available()),
    flags=st.lists(st.tuples(st.one_of(FLAG, OTHER), st.one_of(VALUE.map(str), st.just(""))), max_size=5),
)
def test_flags(recipe, flags, harmless):
    argv = [part for flag in flags for part in flag]
    with harmless(), suppress(InputError):
        options, read = parse_arguments(["--recipe", recipe, *argv])
        _use(read)
        assert options.stages


@given(data=st.one_of(st.binary(max_size=60), damaged(LIST)))
def test_annotation_lists(data, tmp_path_factory, harmless):
    path = tmp_path_factory.getbasetemp() / "train.txt"
    path.write_bytes(data)
    with harmless(), suppress(InputError):
        part = read_list(path)
        num_classes = check_classes(part)
        assert len(part.class_names(num_classes)) == num_classes == len(np.unique(part.labels))


@given(data=st.one_of(st.binary(max_size=40), damaged(b"name,weight\na,1\nb,2.5\n"), damaged(b'{"a": 1, "b": 0.5}')))
def test_numbers_by_class(data, tmp_path_factory, harmless):
    for name in ("weights.csv", "weights.json"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(data)
        with harmless(), suppress(InputError):
            assert np.isfinite(read_class_values(path, ("a", "b"))).all()

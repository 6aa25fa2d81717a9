"""The table of known data sets: rows that agree with recipes and policies, and nothing that repeats them."""

import ast
from pathlib import Path

import pytest
from small_splits import split

import ride_timm
from ride_timm.cli.main import build_parser
from ride_timm.data.augment.policies import POLICIES
from ride_timm.data.datasets import BALANCED, EMBEDDED, KNOWN, LISTED
from ride_timm.data.load import load_longtail
from ride_timm.errors import InputError
from ride_timm.training.recipe import load_recipe

PACKAGE = Path(ride_timm.__file__).parent


@pytest.mark.parametrize("name", KNOWN)
def test_a_row_agrees_with_its_policy_and_its_recipe(name):
    known = KNOWN[name]
    assert known.augment in POLICIES and (known.embedded or known.lists or known.hub_id)
    if known.recipe:
        recipe = load_recipe(known.recipe)
        assert (recipe.dataset, recipe.augment) == (name, known.augment)
        assert recipe.profile == ("exp" if known.balanced else "none")


def test_kinds_of_data_sets():
    assert (EMBEDDED, BALANCED) == (("fashion_lt",), ("cifar10", "cifar100"))
    assert LISTED == ("imagenet_lt", "places_lt", "inat18")


@pytest.mark.parametrize("command", [["datasets"], ["evaluate"]])
def test_help_names_every_data_set(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "fashion_lt (embedded), cifar10, cifar100, imagenet_lt, places_lt, inat18, a Hub id owner/name" in text


def test_no_other_module_of_the_package_names_a_data_set():
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in KNOWN
    }
    # the default recipe, and an AutoAugment policy that bears a data set's name
    assert named == {"data/datasets.py", "training/recipe.py", "data/augment/auto_augment.py"}


# the default profile


def test_data_of_ones_own_are_never_thinned(tmp_path):
    for name in ("train", "test"):
        split([0] * 40 + [1] * 30 + [2] * 20).to_parquet(tmp_path / f"{name}.parquet")
    assert load_longtail(str(tmp_path)).class_counts == [40, 30, 20]
    assert load_longtail("cifar10", tmp_path, imb_factor=0.1).class_counts == [30, 9, 3]
    assert load_longtail("cifar10", tmp_path, imb_type="none").class_counts == [40, 30, 20]
    with pytest.raises(InputError, match=r"imb_factor=0\.1 needs a long-tailed profile: add --imb-type exp or step"):
        load_longtail(str(tmp_path), imb_factor=0.1)


def test_the_profile_of_the_embedded_set_may_be_stated():
    stated = load_longtail("fashion_lt", imb_type="exp", imb_factor=0.01)
    assert stated.class_counts == load_longtail("fashion_lt").class_counts

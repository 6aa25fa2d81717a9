"""Options of the training script: flags, and the defaults that a data set chooses."""

import pytest

from ride_timm import InputError
from ride_timm.training.options import parse_arguments
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState


def test_class_means_are_not_asked_for_with_the_classifiers_of_a_run(tmp_path):
    flags = ["--recipe", "finetune", "--from", str(tmp_path)]
    assert parse_arguments(flags)[1].head_init == "class_means"  # of the recipe, which may be re-used
    with pytest.raises(InputError, match="head_init=class_means has no effect with --from"):
        parse_arguments([*flags, "--head-init", "class_means"])


def test_weights_of_a_backbone_are_not_asked_for_with_those_of_a_run(tmp_path):
    flags = ["--recipe", "finetune", "--backbone-weights", "resnet18.pth", "--from", str(tmp_path)]
    with pytest.raises(
        InputError, match=r"backbone_weights=resnet18.pth has no effect with --from, .* leave --backbone-w"
    ):
        parse_arguments(flags)
    assert parse_arguments([*flags, "--adapter", "lora"])[1].backbone_weights  # a run's checkpoint lacks the backbone


@pytest.mark.parametrize("more", [["--from", "runs/other"], ["--recipe", "cifar100_lt"]])
def test_heads_are_not_re_balanced_by_a_router_alone(more):
    flags = ["--stage", "router", "--decouple", "tau_norm", *more]
    with pytest.raises(InputError, match=r"decouple=tau_norm has no effect with --stage router: leave one of them out"):
        parse_arguments(flags)
    assert "heads" in parse_arguments(flags[2:])[0].stages


def test_a_frozen_backbone_turns_off_the_recipes_keys_of_its_training():
    assert load_recipe("finetune").layer_decay is not None
    assert parse_arguments(["--recipe", "finetune", "--freeze", "backbone"])[1].layer_decay is None
    with pytest.raises(InputError, match=r"freeze=backbone leaves layer_decay=0\.7 without effect"):
        parse_arguments(["--recipe", "finetune", "--freeze", "backbone", "--layer-decay", "0.7"])


@pytest.mark.parametrize(("begun", "resumed"), [(None, "cifar"), ("fashion", "fashion")])
def test_a_resumed_run_keeps_its_recipe_where_the_data_set_has_defaults(begun, resumed, colours, tmp_path):
    flags = ["--dataset", str(colours), "--output", str(tmp_path / "run"), "--resume"]
    if begun is not None:
        recipe = load_recipe("fashion_lt").override(dict(dataset=str(colours), augment=begun))
        RunFolder(tmp_path / "run").begin(recipe, TrainingState())
    options, recipe = parse_arguments(flags)
    assert recipe.augment == resumed and ("augment" in options.fixed) == (begun is None)

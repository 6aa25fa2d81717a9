"""Recipes: reading, overriding, flags and errors."""

import dataclasses
import inspect
import math
import re
import shlex

import pytest
import torch

from ride_timm import InputError
from ride_timm.evaluation.macs import count_macs
from ride_timm.losses import LOSSES, make_loss
from ride_timm.models.create import assemble
from ride_timm.models.load import create_ride_model
from ride_timm.models.ride_any import timm_parts
from ride_timm.models.ride_resnet import resnet_parts
from ride_timm.models.ride_resnet_cifar import resnet_cifar_parts
from ride_timm.training.recipe import Recipe, available, describe, listing, load_recipe
from ride_timm.training.recipe_keys import DECOUPLINGS
from ride_timm.training.recipe_yaml import read_yaml


@pytest.mark.parametrize("name", available())
def test_shipped_recipes_read_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy) == recipe
    make_loss(recipe.loss, [5, 3, 2], **recipe.loss_args)
    assert recipe.stage("experts").lr_at(0) <= recipe.lr


@pytest.mark.parametrize("name", available())
def test_recipe_header_has_paper_command_cost_and_result(name, script):
    head = describe(name)
    assert [re.findall(rf"^{label}: ", head, re.M) for label in ("Paper", "Command", "Cost", "Result")] == [
        ["Paper: "], ["Command: "], ["Cost: "], ["Result: "]
    ]  # fmt: skip
    recipe = load_recipe(name)
    command = re.search(r"^Command: accelerate launch .*train_accelerate\.py(.*)$", head, re.M)[1]
    args, parsed = script.parse_arguments(shlex.split(command))
    assert parsed.override({"mixed_precision": recipe.mixed_precision}).differing(recipe) == []
    begins = recipe.decouple not in ("none", "balanced_softmax") or name.endswith(("_restart", "_average", "_refine"))
    assert recipe.distillation == bool(args.teacher) and begins == bool(args.source)


@pytest.mark.parametrize(
    "name", [name for name in available() if not name.startswith(("imagenet", "inat", "finetune"))]
)
def test_stated_cost_equals_the_counted_macs(name):
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = create_ride_model(
            recipe.model, num_classes=10 if recipe.dataset != "cifar100" else 100, **recipe.model_args
        )
    macs = count_macs(model, (3, *[28 if recipe.augment == "fashion" else 32] * 2)).ensemble
    assert f"Cost: {macs / 1e6:.1f} MMACs per image" in describe(name)


@pytest.mark.parametrize("make", [assemble, resnet_cifar_parts, resnet_parts, timm_parts])
def test_recipes_and_networks_have_the_same_defaults(make):
    recipe = dataclasses.asdict(Recipe())
    shared = [item for item in inspect.signature(make).parameters.values() if item.name in recipe]
    network = {item.name: item.default for item in shared if item.default is not item.empty}
    assert len(network) >= 3 and network == {name: recipe[name] for name in network}


def test_listing_has_every_recipe():
    text = listing()
    for name in available():
        assert f"{name}\n  {describe(name).splitlines()[0]}\n" in text


def test_every_method_has_a_recipe_on_cifar100():
    recipes = [load_recipe(name) for name in available()]
    cifar = [recipe for recipe in recipes if recipe.dataset == "cifar100"]
    assert {recipe.loss for recipe in cifar} >= set(LOSSES)
    learnt_late = {"balanced_softmax"}  # for the heads of any run, by --from; no recipe gains by it
    assert {recipe.decouple for recipe in cifar} == set(DECOUPLINGS) - learnt_late


@pytest.mark.parametrize(
    ("values", "taus"),
    [
        (dict(), (0, 1, 2)),
        (dict(num_experts=1), (1,)),
        (dict(num_experts=5), (0, 0.5, 1, 1.5, 2)),
        (dict(loss="mdcs", auto_augment="v0"), (-0.5, 1, 2.5)),
        (dict(num_experts=2, taus=["-0.5", "2.5"]), (-0.5, 2.5)),
    ],
)
def test_taus_spread_evenly_unless_given(values, taus):
    recipe = Recipe(**dict(dict(loss="balpoe"), **values))
    assert recipe.loss_args["taus"] == taus
    assert len(make_loss(recipe.loss, [5, 3, 2], **recipe.loss_args).offsets) == recipe.num_experts


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_gets_its_arguments(loss):
    recipe = Recipe(loss=loss, auto_augment="v0", gamma=3.0, tau=0.5, inverse_tau=1.5, max_margin=0.3)
    made = make_loss(loss, [5, 3, 2], **recipe.loss_args)
    if "focal" in loss:
        assert made.gamma == 3.0
    if loss == "ldam":
        assert made.margins.max().item() == pytest.approx(0.3)
    assert made.num_views == recipe.num_views == (2 if loss == "mdcs" else 1)
    if loss == "logit_adjustment":
        assert made.offset[0].item() == pytest.approx(0.5 * math.log(0.5))


def test_a_decoupled_recipe_trains_heads_on_balanced_batches():
    recipe = Recipe(decouple="crt", decouple_epochs=4, decouple_lr=0.3, decouple_batch_size=64, epochs=90)
    stage = recipe.stage("heads")
    assert (stage.epochs, stage.batch_size, stage.lr, stage.sampler) == (4, 64, 0.3, "class_balanced")
    assert (recipe.stage("experts").epochs, recipe.stages) == (90, ("experts", "heads", "router"))
    assert stage.lr_at(2) == pytest.approx(0.15)
    closed = Recipe(decouple="tau_norm").stage("heads")  # in closed form, without batches
    assert closed.epochs == 0 and closed.sampler == "instance"


def test_samplers_are_those_of_their_stage():
    recipe = Recipe(sampler="progressive", router_balanced=False)
    assert [recipe.stage(name).sampler for name in ("experts", "router")] == ["progressive", "instance"]
    assert Recipe().stage("experts").sampler == "instance"
    assert Recipe().stage("router").sampler == Recipe(sampler="square_root").stage("router").sampler == "class_balanced"
    assert Recipe(sampler="square_root", decouple="crt").stage("heads").sampler == "class_balanced"
    assert Recipe(sampler="square_root", decouple="balanced_softmax").stage("heads").sampler == "instance"


def test_epochs_alone_scale_decay_and_reweighting():
    recipe = load_recipe("cifar100_lt").override({"epochs": "40"})
    assert (recipe.decay_epochs, recipe.reweight_epoch, recipe.warmup_epochs) == ((32, 36), 32, 5)


def test_given_epochs_are_not_scaled():
    given = {"epochs": 40, "decay_epochs": ["10", "20"], "reweight_epoch": -1}
    recipe = load_recipe("cifar100_lt").override(given)
    assert (recipe.decay_epochs, recipe.reweight_epoch) == ((10, 20), -1)


def test_reweighting_off_reaches_the_loss():
    for loss in ("ride", "ldam"):
        made = [
            make_loss(loss, [5, 3, 2], **Recipe(loss=loss, reweight=on, reweight_epoch=7).loss_args)
            for on in (False, True)
        ]
        for each in made:
            each.set_epoch(7)
        assert [each.reweighting for each in made] == [False, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "abc"}, r"lr='abc': expected a number"),
        ({"lr": 0}, r"lr=0: expected a number, above 0"),
        ({"epochs": 0}, r"epochs=0: expected a whole number, 1 or more"),
        ({"num_experts": -1}, r"num_experts=-1: .* 1 or more"),
        ({"imb_factor": 100}, r"imb_factor=100: .* at most 1 .images.* imbalance factor 100 of papers"),
        ({"imb_factor": 0}, r"imb_factor=0: .* above 0"),
        ({"use_norm": "maybe"}, r"use_norm='maybe': expected true or false"),
        ({"imb_type": "linear"}, r"imb_type='linear': expected one of exp, step, none"),
        ({"dataset": None}, r"dataset=None: expected a value"),
        ({"decay_epochs": ["x"]}, r"decay_epochs=\['x'\]: expected a whole number"),
        ({"select": "best"}, r"set --holdout"),
        ({"patience": 3}, r"set --holdout"),
        ({"teacher_mode": "train"}, r"needs distillation"),
        ({"loss": "hope"}, r"loss='hope': expected one of balpoe, ce, .*ride, sade"),
        (
            {"decouple": "hope"},
            r"decouple='hope': expected one of none, crt, lws, balanced_softmax, tau_norm, logit_adjustment",
        ),
        ({"tau": -1}, r"tau=-1: .* 0 or more and at most 10"),
        ({"loss": "balpoe", "taus": [0, 1]}, r"taus: got 2 for 3 experts"),
        ({"loss": "balpoe", "taus": [0, 1, 3]}, r"taus 0, 1, 3 have a mean of 1.33333: expected 1"),
        ({"loss": "mdcs"}, r"loss=mdcs compares a weak and a strong view: set auto_augment"),
        ({"loss": "mdcs", "auto_augment": "v0", "mixup_alpha": 0.4}, r"set mixup_alpha and cutmix_alpha to 0"),
        ({"loss": "sade", "num_experts": 4}, r"num_experts=4: loss 'sade' trains 3 experts"),
        (
            {"loss": "ride", "class_weights": "auto"},
            r"class_weights=auto: loss 'ride' takes none; those that do are .*ce",
        ),
        ({"loss": "cb_ce", "class_weights": "w.csv"}, r"class_weights=w.csv: loss 'cb_ce' takes none"),
        ({"loss": "ride", "label_smoothing": 0.1}, r"label_smoothing=0.1: loss 'ride' does not support it"),
        ({"label_smoothing": 1}, r"label_smoothing=1: .* at most 0.9"),
        ({"mixup_alpha": -0.4}, r"mixup_alpha=-0.4: .* 0 or more"),
        ({"ema_decay": 1}, r"ema_decay=1: .* at most 0.99999"),
    ],
)
def test_bad_values_name_key_value_and_expectation(values, message):
    with pytest.raises(InputError, match=message):
        Recipe(**values)


def test_unknown_recipe_lists_the_available(tmp_path):
    with pytest.raises(InputError, match=r"recipe 'nope': no such recipe or file; there are .*cifar100_lt"):
        load_recipe("nope")


def test_differing_ignores_keys_without_effect_on_results():
    recipe = Recipe()
    other = dataclasses.replace(recipe, lr=0.2, workers=7, data_dir="elsewhere", name="other")
    assert recipe.differing(other) == ["lr"]


def test_a_stated_default_profile_is_no_difference():
    balanced, any_data = Recipe(dataset="cifar100"), Recipe(dataset="owner/photos")
    assert balanced.differing(balanced.override({"imb_type": "exp"})) == []
    assert any_data.differing(any_data.override({"imb_type": "exp"})) == ["imb_type"]


def test_profile_defaults_to_that_of_the_data_set():
    profiles = {Recipe(dataset=name).profile for name in ("cifar10", "cifar100")}
    others = {Recipe(dataset=name).profile for name in ("fashion_lt", "imagenet_lt", "owner/birds", "my/birds")}
    assert (profiles, others) == ({"exp"}, {"none"})
    assert Recipe(dataset="cifar10", imb_type="none").profile == "none"
    assert Recipe(dataset="owner/birds").override(dict(imb_type="step", imb_factor=0.1)).profile == "step"
    again = Recipe(**read_yaml(Recipe(dataset="cifar10").to_yaml().encode(), "again"))
    assert again.imb_type is None and again.data_args["imb_type"] == "exp"


def test_imbalance_factor_without_a_profile_is_rejected():
    for recipe in (Recipe(dataset="owner/birds"), Recipe(dataset="cifar10", imb_type="none")):
        with pytest.raises(InputError, match=r"imb_factor=0\.01 needs a long-tailed profile"):
            recipe.override(dict(imb_factor=0.01))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(freeze="backbone", layer_decay=0.7), "freeze=backbone leaves layer_decay=0.7 without effect"),
        (dict(freeze="backbone", layer_decay=0.7), "leave it out, by --layer-decay none"),
        (dict(freeze="backbone", drop_path_rate=0.1, grad_checkpointing=True), "drop_path_rate=0.1, grad_checkpoint"),
        (
            dict(freeze="backbone", drop_path_rate=0.1, grad_checkpointing=True),
            "leave them out, by --drop-path-rate 0 --no-grad-checkpointing",
        ),
        (dict(freeze="backbone", ghost_batch=32), "ghost_batch=32"),
        (dict(freeze="backbone", drop_rate=0.5), "drop_rate=0.5 without effect: leave it out, by --drop-rate 0"),
        (dict(freeze="backbone", adapter="lora"), "freeze=backbone leaves adapter=lora without effect: leave it out"),
        (dict(freeze_norm=True, sync_bn=True), "freeze_norm=True leaves sync_bn=True without effect: leave it out"),
    ],
)
def test_keys_without_effect_on_frozen_weights_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        Recipe(**values)


@pytest.mark.parametrize(("images", "epochs"), [(100, 40), (3489, 20), (10_000, 12), (115_846, 5)])
def test_open_epochs_follow_the_number_of_images(images, epochs):
    assert Recipe(epochs=None).for_images(images).epochs == epochs
    assert Recipe(epochs=7).for_images(images).epochs == 7


def test_what_the_data_decide_does_not_disagree_with_a_run():
    begun = Recipe(epochs=None).for_images(100)
    assert Recipe(epochs=None).differing(begun) == [] and "epochs" in Recipe(epochs=7).differing(begun)


@pytest.mark.parametrize(
    ("recipe", "values", "warmup"),
    [
        ("finetune", dict(epochs=1), 0),
        ("finetune", dict(epochs=4), 1),
        ("finetune", dict(epochs=40), 1),
        ("cifar100_lt", dict(epochs=10), 2),
        ("cifar100_lt", dict(epochs=100), 5),
        ("cifar100_lt", dict(epochs=10, warmup_epochs=7), 7),
    ],
)
def test_other_epochs_limit_the_warm_up_to_a_fifth_unless_it_is_given(recipe, values, warmup):
    assert load_recipe(recipe).override(values).warmup_epochs == warmup


@pytest.mark.parametrize("name", available())
def test_given_its_own_epochs_a_recipe_is_unchanged(name):
    recipe = load_recipe(name)
    assert recipe.override(dict(epochs=recipe.epochs)) == recipe


def test_a_single_epoch_of_fine_tuning_ends_at_a_low_learning_rate():
    stage = load_recipe("finetune").override(dict(epochs=1)).stage("experts")
    assert [stage.lr_at(step / 8, 1 / 8) / stage.lr for step in (0, 4, 8)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("name", available())
def test_adaptive_optimizers_have_their_own_learning_rates(name):
    recipe = load_recipe(name).override(dict(decouple="crt"))
    for stage in map(recipe.stage, ("experts", "heads")):
        assert stage.optimizer in ("sgd", "momentum") or (stage.optimizer == "adamw" and stage.lr <= 0.01)


@pytest.mark.parametrize(
    ("values", "num_images", "reweight", "decay"),
    [
        (dict(loss="ride", schedule="step"), 10_000, 10, (10, 11)),  # 12 epochs, of the default's 200
        (dict(loss="ride", schedule="step", epochs=20), 10_000, 16, (16, 18)),
        (dict(loss="ldam", reweight_epoch=8, decay_epochs=[9]), 10_000, 8, (9,)),
        (dict(loss="ldam", reweight_epoch=-1), 10_000, -1, (10, 11)),
    ],
)
def test_points_in_time_follow_epochs_that_the_recipe_leaves_open(values, num_images, reweight, decay):
    recipe = load_recipe("finetune").override(values)
    begun = recipe.for_images(num_images)
    assert (begun.reweight_epoch, begun.decay_epochs) == (reweight, decay)
    assert recipe.differing(begun) == []


def test_epochs_may_be_given_where_the_recipe_leaves_them_open():
    assert load_recipe("finetune").override(dict(epochs="3")).epochs == 3

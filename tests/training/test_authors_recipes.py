"""Recipes against the authors' configurations, value by value."""

import copy
import json
import math
import re
from pathlib import Path

import pytest

from ride_timm.training.recipe import describe, load_recipe

CONFIGS = json.loads((Path(__file__).parents[1] / "parity" / "configs.json").read_text())
NAMES = {
    "imbalance_cifar100_ride": "cifar100_lt",
    "imbalance_cifar100_ride_ea": "cifar100_lt",
    "imbalance_cifar100_distill_ride": "cifar100_lt_distill",
    "imbalance_cifar100_ride_teacher": "cifar100_lt_teacher",
    "imbalance_cifar100_ldam_drw": "cifar100_lt_ldam",
    "imagenet_lt_resnet10_ride": "imagenet_lt_resnet10",
    "imagenet_lt_resnet10_ride_ea": "imagenet_lt_resnet10",
    "imagenet_lt_resnet10_distill_ride": "imagenet_lt_resnet10_distill",
    "imagenet_lt_resnet50_ride": "imagenet_lt_resnet50",
    "imagenet_lt_resnet50_ride_ea": "imagenet_lt_resnet50",
    "imagenet_lt_resnet50_distill_ride": "imagenet_lt_resnet50_distill",
    "imagenet_lt_resnext50_ride": "imagenet_lt_resnext50",
    "imagenet_lt_resnext50_ride_ea": "imagenet_lt_resnext50",
    "imagenet_lt_resnext50_distill_ride": "imagenet_lt_resnext50_distill",
    "iNaturalist_resnet50_ride": "inat18_resnet50",
    "iNaturalist_resnet50_ride_ea": "inat18_resnet50",
    "iNaturalist_resnet50_distill_ride": "inat18_resnet50_distill",
}
DATA = {  # their loader -> data set, augmentation, profile and classes
    "ImbalanceCIFAR100DataLoader": ("cifar100", "cifar", "exp", 100),
    "ImageNetLTDataLoader": ("imagenet_lt", "imagenet", "none", 1000),
    "iNaturalistDataLoader": ("inat18", "inat", "none", 8142),
}
MODELS = {"ResNet32": "ride_resnet32", "ResNet10": "ride_resnet10", "ResNet50": "ride_resnet50",
          "ResNeXt50": "ride_resnext50"}  # fmt: skip
# defaults of their RIDELoss
RIDE_DEFAULTS = {"additional_diversity_factor": -0.2, "reweight_factor": 0.05, "base_diversity_temperature": 1.0}
RIDE_DEFAULTS |= {"max_m": 0.5, "base_loss_factor": 1.0, "s": 30}
# no counterpart in a recipe: saving, monitoring, and keys that only their code needs
ELSEWHERE = {"metrics": None, "trainer": ("save_period", "monitor", "tensorboard"), "arch": ("returns_feat",),
             "distill_arch": ("returns_feat",), "data_loader": ("shuffle",)}  # fmt: skip


def test_every_configuration_has_a_recipe():
    assert len(CONFIGS) == 17 and set(NAMES) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_matches_the_configuration(name):
    config, recipe = copy.deepcopy(CONFIGS[name]), load_recipe(NAMES[name])
    routing = name.endswith("_ea")
    arch, loader, optimizer = config["arch"], config["data_loader"], config["optimizer"]
    take, left = dict.pop, config  # compared values are popped; nothing may remain
    for group, keys in ELSEWHERE.items():
        if keys is None:
            left.pop(group)
        for key in keys or ():
            if group in config:
                config[group].get("args", config[group]).pop(key, None)

    dataset, augment, imb_type, num_classes = DATA[take(loader, "type")]
    assert (recipe.dataset, recipe.augment, recipe.imb_type) == (dataset, augment, imb_type)
    assert recipe.imb_type == "none" or recipe.imb_factor == 0.01
    assert MODELS[take(arch, "type").removesuffix("Model").removesuffix("EA")] == recipe.model
    assert take(arch["args"], "num_classes") == num_classes
    for key in ("num_experts", "reduce_dimension", "use_norm"):
        assert getattr(recipe, key) == take(arch["args"], key)

    stage = recipe.stage("router" if routing else "experts")
    assert stage.batch_size == take(loader["args"], "batch_size")
    assert stage.sampler == ("class_balanced" if loader["args"].pop("balanced", False) else "instance")
    assert take(optimizer, "type") == "SGD"
    assert stage.lr == take(optimizer["args"], "lr")
    assert stage.weight_decay == take(optimizer["args"], "weight_decay")
    assert recipe.momentum == take(optimizer["args"], "momentum")
    assert stage.optimizer == ("sgd" if optimizer["args"].pop("nesterov", False) else "momentum")  # as timm names them
    assert stage.decay_norm_and_bias
    assert stage.epochs == take(config["trainer"], "epochs")

    processes = take(config, "n_gpu")
    workers = take(loader["args"], "num_workers")  # theirs count for all GPUs, ours per process
    if routing:
        assert processes == 1
        assert take(arch["args"], "top_choices_num") == recipe.top_choices_num
        assert take(arch["args"], "pos_weight") == recipe.pos_weight
        assert take(config, "loss") == {"type": "CrossEntropyLoss"}  # their router loss is in the model
        assert take(config, "lr_scheduler") == {
            "type": "CosineAnnealingLR", "args": {"T_max": recipe.router_epochs, "eta_min": 0.0}
        }  # fmt: skip
    else:
        assert recipe.workers == math.ceil(workers / processes)
        launched = re.search(r"--num_processes (\d+)", describe(recipe.name))
        assert int(launched[1] if launched else 1) == processes
        scheduler = take(config, "lr_scheduler")
        assert scheduler == {
            "type": "CustomLR",
            "args": {"step1": recipe.decay_epochs[0], "step2": recipe.decay_epochs[1], "gamma": recipe.decay_rate,
                     "warmup_epoch": recipe.warmup_epochs},
        }  # fmt: skip
        assert len(recipe.decay_epochs) == 2 and recipe.schedule == "step"
        compare_loss(take(config, "loss"), recipe)
        compare_teacher(config.pop("distill_arch", None), recipe, num_classes)
    rest = {group: value.get("args", value) for group, value in left.items()}
    assert not any(rest.values()), rest


def compare_loss(loss, recipe):
    args = loss["args"]
    if loss["type"] == "LDAMLoss":
        assert recipe.loss == "ldam" and args == {"reweight_epoch": recipe.reweight_epoch}
        assert recipe.loss_args == {"max_margin": 0.5, "reweight": True, "reweight_epoch": args["reweight_epoch"]}
        return
    distilled = loss["type"] == "RIDELossWithDistill"
    assert distilled or loss["type"] == "RIDELoss"
    assert recipe.loss == "ride" and recipe.distillation == distilled
    if distilled:
        assert recipe.distill_temperature == args.pop("distill_temperature")
        assert recipe.teacher_mode == "train"  # theirs always is
    expected = RIDE_DEFAULTS | args
    expected["max_margin"] = expected.pop("max_m")
    assert expected.pop("base_loss_factor") == 1.0 and expected.pop("s") == 30  # our defaults, not recipe keys
    assert recipe.loss_args == expected


def compare_teacher(teacher, recipe, num_classes):
    assert (teacher is not None) == recipe.distillation
    if teacher is None:
        return
    plain = load_recipe(recipe.name.removesuffix("_distill")).override({"num_experts": 6})
    if recipe.name == "cifar100_lt_distill":
        assert load_recipe("cifar100_lt_teacher").num_experts == 6
    args = teacher["args"]
    assert MODELS[teacher["type"].removesuffix("Model")] == plain.model
    assert args.pop("num_classes") == num_classes
    for key in ("num_experts", "reduce_dimension", "use_norm"):
        assert getattr(plain, key) == args.pop(key)
    assert not args


# Values read in the code of methods that came after RIDE, on CIFAR100-LT with an imbalance factor of 100.
_SGD = dict(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="step", decay_rate=0.1)
_THREE = dict(_SGD, dataset="cifar100", imb_factor=0.01, model="ride_resnet32", num_experts=3)
LATER = {
    "cifar100_lt_sade": dict(
        _THREE, loss="sade", epochs=200, batch_size=128, decay_epochs=(160, 180), warmup_epochs=5, reduce_dimension=True
    ),
    "cifar100_lt_balpoe": dict(
        _THREE, loss="balpoe", epochs=200, batch_size=128, decay_epochs=(160, 180), warmup_epochs=5, taus=(0, 1, 2),
        mixup_alpha=0.4, reduce_dimension=False,
    ),
    "cifar100_lt_mdcs": dict(
        _THREE, loss="mdcs", epochs=400, batch_size=64, decay_epochs=(200, 320, 380), warmup_epochs=20,
        taus=(-0.5, 1, 2.5), consistency=0.6, auto_augment="cifar10", cutout=16, reduce_dimension=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_recipes_of_later_methods_have_the_values_of_their_code(name):
    recipe = load_recipe(name)
    assert {key: getattr(recipe, key) for key in LATER[name]} == LATER[name]


def test_mdcs_rotates_its_weak_view_alone_and_warms_its_consistency_up_for_20_epochs():
    recipe = load_recipe("cifar100_lt_mdcs")
    strong = recipe.policy.strong(recipe.auto_augment, recipe.cutout)
    assert (strong.rotation, strong.weak.rotation, strong.weak.cutout) == (0, 15, 0)
    assert recipe.num_views == 2 and recipe.loss_class.ramp_epochs == 20

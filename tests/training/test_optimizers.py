"""Optimizers of a stage: usability, parameter groups and weight decay."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from ride_timm import InputError
from ride_timm.losses import make_loss
from ride_timm.training import optimizers
from ride_timm.training.objectives import ExpertsObjective
from ride_timm.training.optimizers import check_optimizer, make_optimizer
from ride_timm.training.recipe import Recipe


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb", "madgrad", "adan", "lion", "muon"])
def test_usable_optimizers_pass(name):
    check_optimizer(name, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hope", "timm knows .*adamw"),
        ("adahessian", r"does not work here \(RuntimeError"),
    ],
)
def test_unusable_optimizers_are_rejected(name, message):
    with pytest.raises(InputError, match=f"optimizer='{name}'.*{message}"):
        check_optimizer(name, torch.device("cpu"))


def test_it_is_tried_as_it_will_be_used(monkeypatch):
    def fused(*args, fused=False, **kwargs):
        raise RuntimeError(f"{fused=} is not for this device")

    monkeypatch.setattr(optimizers, "create_optimizer_v2", fused)
    with pytest.raises(InputError, match="fused=True is not for this device"):
        check_optimizer("sgd", torch.device("cpu"))


def test_missing_package_is_reported(monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("no bitsandbytes")

    monkeypatch.setattr(optimizers, "create_optimizer_v2", missing)
    with pytest.raises(InputError, match=r"optimizer='bnbadamw' does not work here \(ImportError: no bitsandbytes\)"):
        check_optimizer("bnbadamw", torch.device("cpu"))


@pytest.mark.parametrize("decayed", [True, False])
@pytest.mark.parametrize(("name", "fused"), [("sgd", True), ("adamw", True), ("lamb", False)])
def test_parameter_groups_follow_the_stage(name, fused, decayed):
    model = timm.create_model("test_ride_resnet", num_classes=3, num_experts=2)
    objective = ExpertsObjective(model, make_loss("ce", [3, 2, 1]))
    recipe = Recipe().override(dict(optimizer=name, lr=0.3, weight_decay=0.01, decay_norm_and_bias=decayed))
    optimizer = make_optimizer(recipe.stage("experts"), objective, 0.8)
    groups = optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["weight_decay"] for group in groups} == ({0.01} if decayed else {0.01, 0.0})
    exempt = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert all(p.ndim == 1 for p in exempt) and bool(exempt) != decayed
    assert all(bool(group.get("fused")) == fused and group["lr"] == 0.3 for group in groups)


def test_no_weight_decay_of_a_transformer_is_respected():
    model = timm.create_model("ride", backbone="test_vit", num_classes=3, num_experts=2)
    objective = ExpertsObjective(model, make_loss("ce", [3, 2, 1]))
    stage = Recipe().override(dict(optimizer="adamw", decay_norm_and_bias=False)).stage("experts")
    groups = make_optimizer(stage, objective, 0.9).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    exempt = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert "trunk.net.pos_embed" in exempt and model.no_weight_decay() <= exempt
    assert exempt == model.no_weight_decay() | {name for name, p in model.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_efficientnet"])
def test_layer_decay_gives_trunk_and_experts_the_scales_of_the_backbone(backbone):
    """Each weight of trunk and experts has the scale that timm gives it in the backbone itself."""
    model = timm.create_model("ride", backbone=backbone, num_classes=3, num_experts=2)
    objective = ExpertsObjective(model, make_loss("ce", [3, 2, 1]))
    stage = Recipe().override(dict(optimizer="adamw", decay_norm_and_bias=False, layer_decay=0.5)).stage("experts")
    groups = make_optimizer(stage, objective, 0.9).param_groups
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    native = timm.create_model(backbone, num_classes=3)
    theirs = {}
    for group in param_groups_layer_decay(native, stage.weight_decay, native_exempt(native), layer_decay=0.5):
        theirs |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    expected = {name: theirs[id(p)] for name, p in native.named_parameters()}
    seen = {name: scales[id(p)] for name, p in model.named_parameters()}
    inside = {name: value for name, value in seen.items() if ".net." in name}
    assert inside == {name: expected[name.split(".net.")[1]] for name in inside}
    assert {seen[name][0] for name in seen if ".fc." in name} == {1.0}


def native_exempt(net):
    return net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()


@pytest.mark.parametrize(("freeze", "trained"), [("trunk", {"experts"}), ("backbone", {"fc"})])
def test_frozen_weights_are_in_no_group(freeze, trained):
    model = timm.create_model("ride", backbone="test_vit", num_classes=3, num_experts=2)
    objective = ExpertsObjective(model, make_loss("ce", [3, 2, 1]), freeze=freeze)
    stage = Recipe().override(dict(optimizer="adamw", layer_decay=None if freeze == "backbone" else 0.5))
    groups = make_optimizer(stage.stage("experts"), objective, 0.9).param_groups
    chosen = {id(p) for group in groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    prefix = "experts." if trained == {"experts"} else ("experts.0.fc.", "experts.1.fc.")
    assert names == {name for name, _ in model.named_parameters() if name.startswith(prefix)}


@pytest.fixture
def scaled(monkeypatch):
    """Uninitialised memory is NaN, and the scaler must not read whether a step overflowed, which waits for a GPU."""
    monkeypatch.delattr(torch.amp.GradScaler, "_maybe_opt_step")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def steps_of(name, scaled_gradients, momentum=0.9):
    """The weights after steps of fp16's scaler on these gradients, which it divides by its scale."""
    model = timm.create_model("test_ride_resnet", num_classes=3, num_experts=2)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    objective = ExpertsObjective(model, make_loss("ce", [3, 2, 1]))
    stage = Recipe().override(dict(optimizer=name, lr=0.1, weight_decay=0.01)).stage("experts")
    optimizer = make_optimizer(stage, objective, momentum)
    scaler = torch.amp.GradScaler("cpu", init_scale=8, growth_interval=100)
    assert scaler.scale(torch.ones(())) == 8
    for gradient in scaled_gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("name", "momentum"), [("sgd", 0.9), ("momentum", 0.9), ("momentum", 0.0), ("adam", 0.9), ("adamw", 0.9)]
)
def test_a_first_step_that_overflows_changes_nothing(name, momentum, scaled):
    skipped, plain = (steps_of(name, [*first, 0.5, 0.25], momentum) for first in ([float("inf")], []))
    torch.testing.assert_close(skipped, plain)
    assert all((parameter != 1).all() for parameter in plain)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_momentum_that_begins_at_zero_takes_the_first_steps_of_torch(name):
    ours = steps_of(name, [0.5, 0.25])
    theirs = torch.nn.Parameter(torch.ones(5))
    how = dict(momentum=0.9, weight_decay=0.01, nesterov=name == "sgd", fused=True)
    optimizer = torch.optim.SGD([theirs], 0.1, **how)
    for gradient in (0.5, 0.25):
        theirs.grad = torch.full_like(theirs, gradient)
        optimizer.step()
    assert all(torch.equal(parameter.flatten(), theirs[:1].expand(parameter.numel())) for parameter in ours)

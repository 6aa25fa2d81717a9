"""Saved networks load again, through timm and transformers."""

import json

import pytest
import timm
import torch
from small_backbones import build, lively
from timm.models import save_for_hf

from ride_timm.models import Ride, Router
from ride_timm.models.release import without_implied_args
from ride_timm.training.run_folder import RunFolder

SMALL = dict(num_classes=7, num_experts=2)


def plain(tmp_path) -> Ride:
    return timm.create_model("test_ride_resnet", **SMALL)


def from_a_backbones_weights(tmp_path) -> Ride:
    torch.save(lively("test_resnet").state_dict(), tmp_path / "backbone.pth")
    model = timm.create_model(
        "ride", backbone="test_resnet", backbone_pretrained=str(tmp_path / "backbone.pth"), **SMALL
    )
    (tmp_path / "backbone.pth").unlink()
    return model


def with_a_router(tmp_path) -> Ride:
    model = plain(tmp_path)
    model.add_router(Router(2, 32, 7, 3, share_expert_help_pred_fc=False))
    return model


def with_class_affine(tmp_path) -> Ride:
    model = plain(tmp_path)
    model.add_class_affine()
    return model


def with_other_classes(tmp_path) -> Ride:
    model = timm.create_model("test_ride_resnet", class_affine=True, router=True, **SMALL)
    model.reset_classifier(4)
    return model


def without_classes(tmp_path) -> Ride:
    model = with_a_router(tmp_path)
    model.reset_classifier(0)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [plain, from_a_backbones_weights, with_a_router, with_class_affine, with_other_classes, without_classes],
    ids=lambda make: make.__name__,
)
def test_saved_by_timm_and_loaded_again(make, tmp_path):
    model, x = make(tmp_path).eval(), torch.randn(2, 3, 64, 64)
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(again(x), model(x)) and (again.router is None) == (model.router is None)
    if model.router is not None:
        assert torch.equal(again.forward_routed(x)[1], model.forward_routed(x)[1])
    timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=False)  # needs no other weights


EXPORTED = [
    ("test_ride_resnet", dict(router=True, class_affine=True), {}),
    ("test_ride_resnet", dict(in_chans=1, global_pool="max"), dict(in_chans=1, global_pool="max")),
    ("ride", dict(backbone="test_vit", img_size=64, use_norm=True), {}),
    ("ride", dict(backbone="test_convnext", in_chans=1), dict(in_chans=1)),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "given", "kept"), EXPORTED, ids=str)
def test_exported_arguments_repeat_nothing(name, given, kept, tmp_path):
    model = timm.create_model(name, **given, **SMALL).eval()
    RunFolder(tmp_path).export(model, dict(input_size=(model.in_chans, 64, 64)), ())
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert {key: args[key] for key in ("num_classes", "in_chans", "global_pool") if key in args} == kept
    again, x = (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        torch.randn(2, model.in_chans, 64, 64),
    )
    assert again.num_classes == 7 and torch.equal(again(x), model(x))


@pytest.mark.parametrize("router", [False, True])
def test_exported_arguments_state_the_defaults(router, tmp_path):
    model = timm.create_model("ride", backbone="test_resnet", router=router, **SMALL)
    RunFolder(tmp_path).export(model, dict(input_size=(3, 64, 64)), ())
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    expected = dict(use_norm=True) | (dict(top_choices_num=5, share_expert_help_pred_fc=True) if router else {})
    assert expected.items() <= args.items() and ("top_choices_num" in args) == router


@torch.no_grad()
@pytest.mark.parametrize(("name", "given", "kept"), EXPORTED, ids=str)
def test_transformers_loads_a_run_folder(name, given, kept, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = timm.create_model(name, **given, **SMALL).eval()
    RunFolder(tmp_path).export(model, dict(input_size=(model.in_chans, 64, 64)), tuple("abcdefg"))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, model.in_chans, 64, 64)
    assert torch.equal(again(x).logits, model(x)) and again.config.id2label[6] == "g"


def test_implied_arguments_leave_a_config_that_has_them():
    args = dict(router=True, num_experts=3, num_classes=7, in_chans=3, global_pool="fastavg")
    config = dict(architecture="ride_resnet32", num_classes=7, model_args=args, sha256="0")
    assert without_implied_args(config) == dict(config, model_args=dict(router=True, num_experts=3))


@torch.no_grad()
def test_a_routed_network_serves_for_features(tmp_path):
    model = timm.create_model("test_ride_resnet", router=True, routed=True, **SMALL).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    x = torch.randn(2, 3, 64, 64)
    pooled = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    assert torch.equal(pooled(x), model.forward_head(model.forward_features(x), pre_logits=True))
    maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()(x)
    assert torch.equal(maps[-1], model.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize("heads", [{}, dict(class_affine=True)], ids=str)
def test_classifiers_of_several_layers_are_adapted_to_other_classes(heads, tmp_path):
    given = dict(backbone="caformer_s18", num_classes=7, num_experts=1)
    model, x = timm.create_model("ride", **given, **heads).eval(), torch.randn(2, 3, 64, 64)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4).eval()
    assert again(x).shape == (2, 4) and torch.equal(again.forward_features(x), model.forward_features(x))


def test_features_of_tokens_are_timms_last_levels():
    ours, theirs = build("test_vit", features_only=True), timm.create_model("test_vit", features_only=True)
    assert ours.feature_info.out_indices == theirs.feature_info.out_indices
    assert any(key.startswith("model.experts") for key in ours.state_dict())


def test_features_of_a_head_that_needs_its_pooling():
    assert len(build("inception_next_atto", features_only=True).eval()(torch.randn(1, 3, 64, 64))) == 4


@torch.no_grad()
def test_torchscript_refuses_to_route():
    model = timm.create_model("test_ride_resnet", router=True, **SMALL).eval()
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    routed = timm.create_model("test_ride_resnet", router=True, routed=True, **SMALL).eval()
    with pytest.raises(torch.jit.Error, match="TorchScript cannot route: create the network with routed=False"):
        torch.jit.script(routed)(x)

"""Weights of a backbone: complete, of this network, and who is warned."""

import json
import logging
import warnings

import pytest
import timm
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

import ride_timm  # noqa: F401  (registers the models)
from ride_timm.models import backbone_weights
from ride_timm.models.backbone_weights import differences, stated_network, warn_of_twin


@pytest.mark.parametrize(
    ("name", "other", "found"),
    [
        (
            "tf_efficientnet_lite0",
            "efficientnet_lite0",
            [
                "Conv2dSame for Conv2d",
                "BatchNormAct2d with eps 0.001 for 1e-05",
                "mean (0.5, 0.5, 0.5) for (0.485, 0.456, 0.406)",
                "std (0.5, 0.5, 0.5) for (0.229, 0.224, 0.225)",
            ],
        ),
        ("resnet18", "resnet18", []),
        ("resnet50", "resnet50d", []),  # other tensors: loading itself fails
    ],
)
def test_differences_of_networks_with_the_same_tensors(name, other, found):
    assert differences(name, other) == found


@pytest.mark.parametrize(
    ("file", "config", "name"),
    [
        ("tf_efficientnet_lite0-0aa007d2.pth", None, "tf_efficientnet_lite0"),
        ("resnet18.a1_in1k.safetensors", None, "resnet18"),
        ("efficientnet_lite0_ra-37913777.pth", None, "efficientnet_lite0"),
        ("model.safetensors", "efficientnet_lite0", "efficientnet_lite0"),
        ("resnet18.pth", "resnet34", "resnet34"),
        ("weights.pth", None, None),
        ("weights.pth", ["a list"], None),
    ],
)
def test_the_network_that_a_file_states(file, config, name, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(dict(architecture=config)))
    assert stated_network(tmp_path / file) == name


@pytest.mark.parametrize(
    ("backbone", "file", "warned"),
    [
        ("efficientnet_lite0", "tf_efficientnet_lite0.safetensors", True),
        ("efficientnet_lite0", "weights.safetensors", True),
        ("tf_efficientnet_lite0", "weights.safetensors", True),
        ("tf_efficientnet_lite0.in1k", "tf_efficientnet_lite0.safetensors", False),
        ("resnet18", "weights.safetensors", False),
    ],
)
def test_only_weights_that_may_be_of_another_network_are_warned_of(backbone, file, warned, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_twin(backbone, tmp_path / file)
    assert [("Conv2dSame" in str(w.message), backbone in str(w.message)) for w in caught] == [(True, True)] * warned


def test_loading_such_weights_warns(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), file)
    with pytest.warns(UserWarning, match="fit tf_efficientnet_lite0 as well"):
        timm.create_model("ride", backbone="efficientnet_lite0", backbone_pretrained=file, num_classes=2, num_experts=1)


@pytest.mark.parametrize("num_classes", [7, 1000])
@pytest.mark.parametrize(
    ("of", "words"), [("test_convnext", "lack|Missing|size mismatch"), ("test_vit2", "lack|Missing|size")]
)
def test_weights_of_another_network_are_refused_with_any_number_of_classes(of, words, num_classes, tmp_path):
    """With other classes than its own, timm loads what fits and logs the rest: the backbone would stay at random."""
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model(of).state_dict(), file)
    with pytest.raises(ValueError, match=r"backbone='test_vit': its weights in .*weights.safetensors (lack|could not)"):
        timm.create_model("ride", backbone="test_vit", backbone_pretrained=file, num_classes=num_classes)


@pytest.mark.parametrize("num_classes", [7, 1000])
def test_weights_of_another_network_say_which_by_their_name(num_classes, tmp_path):
    file = tmp_path / "test_convnext.in1k.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), file)
    with pytest.raises(ValueError, match=r"the file is of test_convnext: pass --backbone test_convnext\.$"):
        timm.create_model("ride", backbone="test_vit", backbone_pretrained=file, num_classes=num_classes)


@pytest.mark.parametrize("tag, warned", [("dino", True), ("augreg_in21k_ft_in1k", False)])
def test_weights_of_another_tag_warn_of_their_input(tmp_path, tag, warned):
    """Their architecture is the same, their normalisation is not."""
    cfg = timm.get_pretrained_cfg(f"vit_small_patch16_224.{tag}").to_dict()
    config = dict(architecture="vit_small_patch16_224", pretrained_cfg=dict(cfg, mean=list(cfg["mean"])))
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_twin("vit_small_patch16_224", tmp_path / "model.safetensors")
    found = "states mean (0.485, 0.456, 0.406) for (0.5, 0.5, 0.5)"
    assert [found in str(one.message) for one in caught] == [True] * warned


@pytest.mark.parametrize("num_classes", [7, 1000])
@pytest.mark.parametrize(("of", "backbone"), [("resnet34", "resnet18"), ("seresnet18", "resnet18")])
def test_weights_of_a_deeper_network_are_refused_with_any_number_of_classes(of, backbone, num_classes, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model(of).state_dict(), file)
    with pytest.raises(ValueError, match=f"backbone='{backbone}': its weights in .*(beyond its own, layer|could not)"):
        timm.create_model("ride", backbone=backbone, backbone_pretrained=file, num_classes=num_classes)


@pytest.mark.parametrize("lost", ["bn1.running_mean", "bn1.weight", "blocks.0.0.bn1.bias"])
def test_a_tensor_of_one_dimension_is_not_left_at_its_start(tmp_path, lost):
    weights = timm.create_model("test_efficientnet").state_dict()
    file = tmp_path / "weights.safetensors"
    save_file({name: value for name, value in weights.items() if name != lost}, file)
    with pytest.raises(ValueError, match=f"lack {lost}: not of this network"):
        timm.create_model("ride", backbone="test_efficientnet", backbone_pretrained=file, num_classes=3)


def test_the_norm_beside_a_classifier_may_be_left_out(tmp_path):
    """Such as from the weights of FCMAE, which timm loads without it."""
    file, net = tmp_path / "weights.safetensors", timm.create_model("test_convnext")
    save_file({name: value for name, value in net.state_dict().items() if not name.startswith("head.")}, file)
    model = timm.create_model("ride", backbone="test_convnext", backbone_pretrained=file, num_classes=3)
    assert torch.equal(model.trunk.net.stem[0].weight, net.stem[0].weight)


def test_a_missing_key_is_called_one(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    with pytest.raises(ValueError, match="could not be loaded or do not fit: KeyError: 'blocks"):
        timm.create_model("ride", backbone="test_convnext", backbone_pretrained=file, num_classes=3)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    file, net = tmp_path / "weights.safetensors", timm.create_model("test_vit")
    torch.nn.init.constant_(net.patch_embed.proj.bias, float("inf"))
    save_file(net.state_dict(), file)
    with pytest.raises(ValueError, match=r"64 of the 64 values of patch_embed\.proj\.bias are NaN or infinite"):
        timm.create_model("ride", backbone="test_vit", backbone_pretrained=file, num_classes=3)


def test_weights_with_the_classifier_left_out_are_taken(tmp_path):
    file, net = tmp_path / "weights [1]*?#.safetensors", timm.create_model("test_vit")
    save_file({name: value for name, value in net.state_dict().items() if not name.startswith("head.")}, file)
    model = timm.create_model("ride", backbone="test_vit", backbone_pretrained=file, num_classes=3)
    assert torch.equal(model.trunk.net.patch_embed.proj.weight, net.patch_embed.proj.weight)


PUBLISHED = "test_vit.r160_in1k"


def hub_that(error, monkeypatch):
    """Let the client raise an error, and timm's own download fail the test."""

    def ask(url, timeout):
        if error is not None:
            raise error

    monkeypatch.setattr(backbone_weights, "get_hf_file_metadata", ask)
    monkeypatch.setattr(backbone_weights, "try_to_load_from_cache", lambda *_, **how: None)


@pytest.mark.parametrize("error", [errors.HTTPError("refused"), errors.OfflineModeIsEnabled("offline")])
def test_an_unreachable_hub_is_one_error_before_timm_retries(error, monkeypatch):
    hub_that(error, monkeypatch)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **how: pytest.fail("downloads"))
    with pytest.raises(ValueError, match=f"{PUBLISHED}'.* Hub is unreachable .* --backbone-weights FILE") as refused:
        timm.create_model("ride", backbone=PUBLISHED, backbone_pretrained=True, num_classes=3)
    assert refused.value.__cause__ is error and "do not fit" not in str(refused.value)


def test_a_refused_connection_is_not_retried_and_not_logged(monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(backbone_weights, "hf_hub_url", lambda *_, **how: "http://127.0.0.1:9/weights")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for a second try"))
    with caplog.at_level(logging.WARNING, "huggingface_hub"), pytest.raises(ValueError, match="Hub is unreachable"):
        timm.create_model("ride", backbone=PUBLISHED, backbone_pretrained=True, num_classes=3)
    assert not caplog.records


def test_a_connection_lost_in_the_download_says_the_same(monkeypatch):
    def lose(*_, **how):
        raise errors.LocalEntryNotFoundError("lost")

    hub_that(None, monkeypatch)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lose)
    with pytest.raises(ValueError, match="Hub is unreachable"):
        timm.create_model("ride", backbone=PUBLISHED, backbone_pretrained=True, num_classes=3)


def test_weights_in_the_cache_need_no_network(monkeypatch, tmp_path):
    file, net = tmp_path / "model.safetensors", timm.create_model("test_vit")
    save_file(net.state_dict(), file)
    hub_that(errors.HTTPError("refused"), monkeypatch)
    monkeypatch.setattr(backbone_weights, "try_to_load_from_cache", lambda repo, name, **how: str(file))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **how: str(file))
    model = timm.create_model("ride", backbone=PUBLISHED, backbone_pretrained=True, num_classes=3)
    assert torch.equal(model.trunk.net.patch_embed.proj.weight, net.patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("files", "words"),
    [(["b.bin", "a.safetensors"], r"one of .*a\.safetensors, .*b\.bin"), (["notes.txt"], "it holds no .safetensors")],
)
def test_a_folder_of_weights_is_answered_by_its_files(files, words, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"a folder, expected the file of the weights: {words}"):
        timm.create_model("ride", backbone="test_vit", backbone_pretrained=tmp_path, num_classes=3)


@pytest.mark.parametrize(
    ("backbone", "size", "words"),
    [
        ("test_vit", 8, r"8 x 8 pixels \(its patches are of 16 x 16\): choose a larger .*--input-size"),
        ("maxvit_rmlp_pico_rw_256", 20, "20 x 20 pixels .*--input-size"),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_images_smaller_than_a_patch_or_window_are_named(backbone, size, words, pretrained):
    with pytest.raises(ValueError, match=f"backbone='{backbone}' takes no images of {words}"):
        timm.create_model("ride", backbone=backbone, backbone_pretrained=pretrained, img_size=size)

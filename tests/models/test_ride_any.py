"""RIDE on a small network of every family in the table of cuts."""

import contextlib
import os
import re
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from small_backbones import BACKBONES, FEW, build, count, images, lively, native, weights_of
from timm.models._manipulate import group_parameters

import ride_timm  # noqa: F401  (registers the models)
from ride_timm.models import CosineClassifier, Ride
from ride_timm.models.cuts import CUTS, find_cut
from ride_timm.training.run_folder import RunFolder

# the longer checks run on a few families, or on all with RIDE_TIMM_ALL_BACKBONES=1
SEVERAL = list(BACKBONES) if os.environ.get("RIDE_TIMM_ALL_BACKBONES") else FEW


def test_every_family_of_the_table_is_tested():
    tried = {type(timm.create_model(name, device="meta", **kwargs)).__name__ for name, (_, kwargs) in BACKBONES.items()}
    assert tried == set(CUTS)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_expert_is_the_backbone_bit_for_bit(backbone):
    net, x = lively(backbone), images(backbone)
    model = build(backbone, num_experts=1).eval()
    model.load_state_dict(weights_of(net, model))
    twice = [getattr(net, name, None) for name in find_cut(net, backbone).shared]  # in the trunk and in the expert
    assert count(model) == count(net) + sum(count(part) for part in twice if part is not None)
    expected = net(x)
    assert expected.std(0).max() > 1e-3  # the images differ
    assert torch.equal(model(x), expected)
    assert torch.equal(model.forward_experts(x)[1][:, 0], expected)
    assert torch.equal(model.forward_features(x), net.forward_features(x))
    assert (model.num_features, model.head_hidden_size) == (net.num_features, net.head_hidden_size)
    output, levels = model.forward_intermediates(x)
    theirs = net.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(output, model.forward_features(x)) and len(levels) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(levels, theirs, strict=True))
    for i in range(len(model.trunk.feature_info)):
        pruned = deepcopy(model)
        pruned.prune_intermediate_layers([i], prune_norm=True)
        features = pruned.forward_features(x)
        if features.ndim == 4:
            assert torch.equal(features if model.channel_axis == 1 else features.permute(0, 3, 1, 2), levels[i])
        assert not any(key.startswith("experts") for key in pruned.state_dict())
    same = build(backbone, num_experts=3).eval()
    same.load_state_dict(weights_of(net, same))
    torch.testing.assert_close(same(x), expected, rtol=1e-6, atol=1e-6)
    features, logits = same.forward_experts(x)
    assert logits.shape == (2, 3, 7) and features.shape[:2] == (2, 3)
    axis = same.channel_axis
    assert same.forward_features(x).shape[axis] == same.num_features == 3 * net.num_features
    assert [level.shape[1] for level in same.forward_intermediates(x)[1]] == [i["num_chs"] for i in same.feature_info]


@pytest.mark.parametrize("backbone", SEVERAL)
def test_two_training_steps_reach_every_parameter(backbone):
    model, x = build(backbone, num_experts=2).train(), images(backbone, 4)
    with contextlib.suppress(AssertionError):  # some networks have no checkpointing
        model.set_grad_checkpointing(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.forward_experts(x)[1].flatten(0, 1), torch.arange(8) % 7).backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
    moved = [not torch.equal(before[key], p) for key, p in model.named_parameters()]
    assert sum(moved) > 0.5 * len(moved)  # a bias before a norm has no slope, layer scales start at 1e-5
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()


@torch.no_grad()
@pytest.mark.parametrize("backbone", SEVERAL)
def test_save_reload_reset_and_route(backbone, tmp_path):
    model = build(backbone, num_experts=2, router=True, top_choices_num=3, use_norm=backbone in FEW).eval()
    x = images(backbone, 4)
    expected, used = model.forward_routed(x)
    assert expected.shape == (4, 7) and set(used.tolist()) <= {1, 2}
    folder = RunFolder(tmp_path)
    cfg, size = model.pretrained_cfg, tuple(x.shape[1:])
    folder.export(model, dict(input_size=size, mean=cfg["mean"], std=cfg["std"]), ())
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again.forward_routed(x)[0], expected) and torch.equal(again(x), model(x))
    saved = again.pretrained_cfg
    assert tuple(saved["mean"]) == cfg["mean"] and tuple(saved["input_size"]) == size
    kinds = [type(head) for head in model.get_classifier()]
    model.reset_classifier(5)
    assert model(x).shape == (4, 5) and [type(head) for head in model.get_classifier()] == kinds
    assert model.forward_routed(x)[0].shape == (4, 5)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), features) and features.shape == (4, model.head_hidden_size)


def check_stages(model: Ride):
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["trunk.net.stem.conv.weight"] == 0
    for key, group in groups.items():
        stage = re.search(r"net\.stages\.(\d)", key)
        assert stage is None or group == int(stage[1]) + 1


@pytest.mark.parametrize("backbone", SEVERAL)
def test_groups_and_decay_are_the_backbones(backbone):
    model = build(backbone, device="meta")
    net = timm.create_model(backbone, num_classes=7, device="meta", **BACKBONES[backbone][1])
    if not hasattr(net, "group_matcher"):
        return check_stages(model)
    for coarse in (False,) if backbone == "rdnet_tiny" else (True, False):  # timm's RDNet has no coarse groups
        ours = group_parameters(model, model.group_matcher(coarse), reverse=True)
        theirs = group_parameters(net, net.group_matcher(coarse), reverse=True)
        for key, group in ours.items():
            assert group == theirs.get(native(key), max(theirs.values())), key
    names = {name for name, _ in net.named_parameters()}
    exempt = set(net.no_weight_decay()) & names if hasattr(net, "no_weight_decay") else set()
    assert {native(key) for key in model.no_weight_decay()} == exempt


# Arguments


@torch.no_grad()
@pytest.mark.parametrize("backbone", FEW)
def test_every_split_gives_the_backbones_logits(backbone):
    net, x = lively(backbone), images(backbone)
    with pytest.raises(ValueError, match=r"split='layer9'.* can be split before ") as error:
        build(backbone, split="layer9")
    splits = str(error.value).split("before ")[1].rstrip(".").split(", ")
    assert len(splits) >= 1
    expected = net(x)
    for split in splits:
        model = build(backbone, split=split, num_experts=1).eval()
        model.load_state_dict(weights_of(net, model))
        assert torch.equal(model(x), expected), split
        assert count(model) == count(net)
        assert len(model.forward_intermediates(x)[1]) == len(model.feature_info)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(split="layer5"), ValueError, r"split='layer5': test_resnet can be split before layer2, layer3, layer4"),
        (dict(split="layer1"), ValueError, "can be split before layer2"),
        (dict(num_experts=0), ValueError, "num_experts=0"),
        (dict(num_experts=-1), ValueError, "num_experts=-1"),
        (dict(num_expert=3), TypeError, "num_expert"),
        (dict(reduce_dimension=True), TypeError, "reduce_dimension"),
        (
            dict(backbone="convnext_tny"),
            ValueError,
            r"backbone='convnext_tny': timm has no such model; .*convnext_tiny",
        ),
        (dict(backbone="resnet18.nowhere"), ValueError, "nowhere"),
        (dict(backbone="hrnet_w18_small"), ValueError, "HighResolutionNet and cannot be cut: its stages return more"),
        (dict(backbone="deit_tiny_distilled_patch16_224"), ValueError, "cannot be cut: it has two classifiers"),
        (dict(backbone="test_ride_resnet"), ValueError, "cannot be cut: it has experts already"),
        (dict(backbone="vgg11"), ValueError, "VGG and cannot be cut: no cut .* Families that can: .*ConvNeXt"),
        (dict(backbone_pretrained="nowhere.safetensors"), ValueError, "nowhere.safetensors': no such file"),
        (dict(routed=True), ValueError, "routed=True needs a router"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("ride", **dict(dict(backbone="test_resnet"), **kwargs))


def test_positions_unknown_to_experts_are_refused():
    with pytest.raises(ValueError, match=r"dynamic_img_size cannot be cut: .* Create it with dynamic_img_size=0"):
        build("eva02_tiny_patch14_224", dynamic_img_size=True)


# Named networks and timm's contract


@pytest.mark.parametrize(
    ("name", "split", "shared", "own"),
    [
        ("ride_swin_tiny", "layers.2", 2, 2),
        ("ride_swin_small", "layers.2", 2, 2),
        ("ride_convnext_tiny", "stages.2", 2, 2),
        ("ride_vit_small_patch16_224", "blocks.8", 8, 4),
    ],
)
def test_named_networks(name, split, shared, own):
    model = timm.create_model(name, device="meta")
    assert model.num_experts == 3 and model.num_classes == 1000 and model.pretrained_cfg["tag"] == "imagenet_lt"
    assert all(isinstance(head, CosineClassifier) for head in model.get_classifier())
    assert len(model.trunk.feature_info) == shared and len(model.experts[0].stages.feature_info) == own
    assert model.feature_info[shared]["module"] == f"experts.0.stages.net.{split}"
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    with pytest.raises(TypeError, match="backbone"):
        timm.create_model(name, backbone="resnet18", device="meta")


@torch.no_grad()
@pytest.mark.parametrize("backbone", FEW)
def test_features_only(backbone):
    model, x = build(backbone, features_only=True).eval(), images(backbone)
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels() and all(m.ndim == 4 for m in maps)
    sizes = [BACKBONES[backbone][0] // reduction for reduction in model.feature_info.reduction()]
    assert [m.shape[2] for m in maps] == sizes
    first = build(backbone, features_only=True, out_indices=(1,)).eval()
    assert [m.shape[1] for m in first(x)] == first.feature_info.channels()
    if len(build(backbone).trunk.feature_info) > 1:
        assert not any(key.startswith("model.experts") for key in first.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "densenet121"])
def test_compile_export_script_channels_last_and_bfloat16(backbone):  # other families: by the names of test_names.py
    model, x = build(backbone).eval(), images(backbone)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()  # networks of other tests count towards its limit
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    if backbone != "densenet121":  # timm's own DenseNet cannot be scripted
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-5)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["swin_tiny_patch4_window7_224", "deit_tiny_patch16_224"])
def test_sizes_that_vary_from_batch_to_batch(backbone):
    model = build(backbone, dynamic_img_size=True).eval()
    for size in (64, 160, 288):
        assert model(torch.randn(1, 3, size, size)).shape == (1, 7)

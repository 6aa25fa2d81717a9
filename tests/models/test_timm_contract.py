"""timm's model contract: heads, features, input, gradients, saving and loading."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from small_networks import SIZES, SMALL, build, images
from timm.layers import DropPath

from ride_timm import InputError
from ride_timm.training.run_folder import RunFolder


@pytest.mark.parametrize("name", SMALL)
def test_reset_classifier(name):
    model, x = build(name), images(name)
    kinds = [type(head) for head in model.get_classifier()]
    width = model.head_hidden_size
    model.reset_classifier(5)
    assert model(x).shape == (4, 5) and [type(head) for head in model.get_classifier()] == kinds
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (4, 5) and model.head_hidden_size == 2 * width
    assert model.forward_experts(x)[0].shape == (4, 3, 2 * width // 3)
    model.reset_classifier(0)
    assert model(x).shape == (4, 2 * width)
    with pytest.raises(ValueError, match="only num_classes=0 works without pooling"):
        model.reset_classifier(5, "")
    model.reset_classifier(6, "avg")
    assert model(x).shape == (4, 6) and model.head_hidden_size == width


def test_reset_classifier_keeps_dtype_and_mode():
    model = build(router=True).double()
    for mode in (True, False):
        model.train(mode).reset_classifier(5, "max")
        assert all(head.weight.dtype == torch.float64 and head.training is mode for head in model.get_classifier())
        assert model.router.training is mode and model.router.fc[0].weight.dtype == torch.float64


def test_reset_classifier_remakes_the_router():
    model, x = build(router=True, top_choices_num=8, share_expert_help_pred_fc=False), images()
    old = model.router
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.reset_classifier(5)
    assert model.router is not old and model.router.top_choices_num == 5 and len(model.router.fc) == 2
    assert model.forward_routed(x)[0].shape == (4, 5)
    model.reset_classifier(9, "catavgmax")
    assert model.router.hidden[0].in_features == 64 and model.forward_routed(x)[0].shape == (4, 9)
    model.reset_classifier(0)
    assert model.router is None


def test_a_routed_model_keeps_its_classifiers():
    model, x = build(router=True, routed=True), images()
    with pytest.raises(ValueError, match="num_classes must be above 0"):
        model.reset_classifier(0)
    assert model.num_classes == 11 and model(x).shape == (4, 11)  # unchanged


@pytest.mark.parametrize("name", SMALL)
def test_no_classes_gives_pooled_features(name):
    model, x = build(name, num_classes=0), images(name)
    features = model.forward_experts(x)[0]
    torch.testing.assert_close(model(x), features.flatten(1))
    with_head = build(name)
    pre_logits = with_head.forward_head(with_head.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pre_logits, with_head.forward_experts(x)[0].flatten(1))


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name):
    model, x = timm.create_model(name, features_only=True).eval(), images(name)
    maps = model(x)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert [m.shape[1] for m in maps] == channels
    assert [SIZES[name] // m.shape[2] for m in maps] == reductions
    last = timm.create_model(name, features_only=True, out_indices=(1,)).eval()
    assert [m.shape[1] for m in last(x)] == channels[1:2]
    assert not any(key.startswith("experts") for key in last.state_dict())


def test_intermediates_end_in_the_features():
    model, x = build(), images()
    final, levels = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(levels[-1], final)
    assert final.shape[1] == model.num_features
    assert len(levels) == 5 and model.forward_intermediates(x, indices=2, intermediates_only=True)[1] is not None


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels(name, in_chans):
    model = build(name, in_chans=in_chans)
    assert model.in_chans == in_chans and model(images(name, in_chans=in_chans)).shape == (4, 11)


@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n in SMALL for s in (28, 32, 49, 160) if n[-1] == "t" or s < 160]
)
def test_any_input_size(name, size):
    model, x = build(name), images(name, B=2, size=size)
    assert model(x).shape == (2, 11) and model.forward_experts(x)[0].shape[:2] == (2, 3)
    wide = torch.cat([x, x], 3)
    assert model(wide).shape == (2, 11)


def test_dropout_acts_in_training_only():
    model, x = build(drop_rate=0.5, use_norm=False), images()
    assert model.drop_rate == 0.5
    assert torch.equal(model(x), model(x))
    features = model.train().forward_experts(x)[0]
    assert 0.3 < (features == 0).float().mean() < 0.7
    assert not torch.equal(model(x), model(x))


def depths(model) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]


def test_stochastic_depth_grows_as_in_timms_resnets():
    theirs = depths(timm.create_model("resnet50", drop_path_rate=0.3, device="meta"))
    model = build("ride_resnet50", drop_path_rate=0.3, num_experts=2, device="meta")
    assert depths(model.trunk) == pytest.approx(theirs[:6])  # the first of the 3 + 4 shared blocks is never left out
    assert all(depths(expert) == pytest.approx(theirs[6:]) for expert in model.experts)


@pytest.mark.parametrize("name", ["test_ride_resnet", "ride_resnet32"])
def test_stochastic_depth_acts_in_training_only(name):
    model, x = build(name, drop_path_rate=0.5), images(name)
    assert len(depths(model)) == {"test_ride_resnet": 1 + 3 * 2, "ride_resnet32": 4 + 3 * 10}[name]
    plain = build(name)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x)) and not depths(plain)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(plain.train()(x), plain(x))


@pytest.mark.parametrize("name", ["test_ride_resnet", "ride_resnet32"])
def test_checkpointing_gives_the_same_gradients(name):
    plain, x = build(name, num_classes=5).double().train(), images(name, dtype=torch.float64)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    for (key, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10, msg=key)
    assert saving.trunk.grad_checkpointing and saving.experts[2].stages.grad_checkpointing
    saving.set_grad_checkpointing(False)
    assert not saving.trunk.grad_checkpointing


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_ride_resnet", dict(num_experts=1)),
        ("test_ride_resnet", dict(num_experts=2, use_norm=False, in_chans=1)),
        ("test_ride_resnet", dict(router=True, top_choices_num=4, share_expert_help_pred_fc=False)),
        ("test_ride_resnet", dict(share_layer3=True, layer4_output_dim=40)),
        ("ride_resnet32", dict(num_experts=4, reduce_dimension=False, router=True, top_choices_num=7)),
        ("ride_resnet32", dict(num_experts=2, layer2_output_dim=20, layer3_output_dim=40)),
        ("ride_resnet32", dict(num_experts=2, share_layer2=True)),
    ],
)
def test_a_saved_model_loads_through_timm(tmp_path, name, kwargs):
    model, x = build(name, **kwargs), images(name, in_chans=kwargs.get("in_chans", 3))
    side = SIZES[name]
    data = dict(input_size=(x.shape[1], side, side), mean=(0.5,) * x.shape[1], std=(0.25,) * x.shape[1], crop_pct=1.0)
    RunFolder(tmp_path).export(model, data, tuple("abcdefghijk"))
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back(x), model(x))
    assert back.pretrained_cfg["input_size"] == (model.in_chans, side, side)
    assert tuple(back.pretrained_cfg["label_names"]) == tuple("abcdefghijk")
    if kwargs.get("router"):
        assert all(torch.equal(a, b) for a, b in zip(back.forward_routed(x), model.forward_routed(x), strict=True))
    fewer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9).eval()
    torch.testing.assert_close(fewer.forward_experts(x)[0], model.forward_experts(x)[0])
    assert fewer(x).shape == (4, 9)
    if kwargs.get("router"):  # trained on the old logits
        assert not torch.equal(fewer.router.fc[0].weight, model.router.fc[0].weight)
        assert not torch.equal(fewer.router.hidden[0].weight, model.router.hidden[0].weight)


def test_adding_experts_to_saved_weights_is_an_error(tmp_path):
    RunFolder(tmp_path).export(build(num_experts=2), dict(input_size=(3, 64, 64)), tuple("abcdefghijk"))
    with pytest.raises(InputError, match=r"num_experts=2.*missing experts\.2"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_experts=3)


@pytest.mark.parametrize("name", ["test_ride_resnet", "ride_resnet32"])
def test_bfloat16_autocast_is_near(name):
    model, x = build(name), images(name)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        features, expert_logits = model.forward_experts(x)
    assert torch.isfinite(expert_logits).all() and torch.isfinite(features).all()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.5)  # logits are cosines times 30


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same_numbers(name):
    model, x = build(name), images(name)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(n, dict()) for n in SMALL]
    + [("test_ride_resnet", dict(num_experts=1, use_norm=False)), ("test_ride_resnet", dict(share_layer3=True))],
)
def test_every_parameter_gets_a_gradient(name, kwargs):
    model, x = build(name, **kwargs).train(), images(name)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["test_ride_resnet", "ride_resnet32"])
@pytest.mark.parametrize("coarse", [True, False])
def test_groups_run_from_stem_to_head(name, coarse):
    from timm.models._manipulate import group_parameters

    model = build(name, router=True)
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert groups["trunk.conv1.weight"] == groups["trunk.bn1.weight"] == 0
    ends = {groups[key] for key in groups if ".fc." in key or key.startswith("router")}
    assert len(ends) == 1 and ends == {max(groups.values())}
    assert groups["trunk.layer1.0.conv1.weight"] < groups["experts.1.stages.layer3.0.conv1.weight"]
    assert len({groups[f"experts.{i}.stages.layer3.0.conv1.weight"] for i in range(3)}) == 1

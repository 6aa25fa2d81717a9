import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from ride_timm import InputError
from ride_timm.checkpoint import RunFolder
from ride_timm.models import CosineClassifier, Ride, Router

PARAMS = json.loads((Path(__file__).parents[1] / "parity" / "params_100classes.json").read_text())
RIDE_NAMES = timm.list_models("ride_resn*")
NAMES = [*RIDE_NAMES, "test_ride_resnet"]
SIZES = {"test_ride_resnet": 64, "ride_resnet32": 32, "ride_resnet10": 64}
SMALL = list(SIZES)


def build(name="test_ride_resnet", seed=0, **kwargs) -> Ride:
    torch.manual_seed(seed)
    return timm.create_model(name, **dict(dict(num_classes=11), **kwargs)).eval()


def images(name="test_ride_resnet", B=4, in_chans=3, size=None, seed=1, **kwargs):
    side = size or SIZES[name]
    return torch.randn(B, in_chans, side, side, generator=torch.Generator().manual_seed(seed), **kwargs)


def settle(model: Ride, batch) -> Ride:
    """Running statistics of this batch, so that an untrained network tells images apart in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model.forward_experts(batch)
    return model.eval()


@pytest.fixture(scope="module")
def routed() -> tuple[Ride, torch.Tensor]:
    """A tiny model whose gates send about half on, in double precision so that none hangs on rounding; its batch."""
    batch = images(B=24, dtype=torch.float64)
    model = settle(build(router=True, top_choices_num=4, share_expert_help_pred_fc=False).double(), batch)
    torch.manual_seed(5)
    for layer in [*model.router.hidden, *model.router.fc]:
        nn.init.normal_(layer.weight)
    with torch.no_grad():
        gates = model.router(*model.forward_experts(batch))
        for i, layer in enumerate(model.router.fc):
            layer.weight /= gates[:, i].std()
            layer.bias.zero_()
        medians = model.router(*model.forward_experts(batch)).median(0).values
        for layer, median in zip(model.router.fc, medians, strict=True):
            layer.bias -= median
    return model, batch


# Every registered name


@pytest.mark.parametrize("case", PARAMS)
def test_parameter_counts_are_the_authors(case):
    cls, num_experts = case.split("_")
    name = "ride_" + cls.replace("EAModel", "").replace("Model", "").lower()
    full = num_experts == "1"
    kwargs = dict(router=True, top_choices_num=5) if "EA" in cls else {}
    model = timm.create_model(
        name,
        num_experts=int(num_experts),
        reduce_dimension=not full,
        use_norm=False,
        num_classes=100,
        device="meta",
        **kwargs,
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMS[case]


def test_the_networks_of_the_design_are_registered():
    family = ["10", "50", "101", "152", "32"]
    assert set(RIDE_NAMES) == {f"ride_resnet{n}" for n in family} | {f"ride_resnext{n}" for n in ("50", "101", "152")}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_and_gives_logits_in_train_and_eval(name):
    model = timm.create_model(name, device="meta")
    assert isinstance(model, Ride) and model.num_experts == 3 and model.router is None
    assert model.num_classes == model.pretrained_cfg["num_classes"] == (100 if name == "ride_resnet32" else 1000)
    assert model.in_chans == 3 and model.pretrained_cfg["architecture"] == name
    x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
    for training in (True, False):
        assert model.train(training)(x).shape == (2, model.num_classes)
    features, logits = model.forward_experts(x)
    width = model.head_hidden_size // 3
    assert features.shape == (2, 3, width) and logits.shape == (2, 3, model.num_classes)
    assert model.num_features == 3 * width
    names = dict(model.named_modules())
    classifiers = model.get_classifier()
    assert [names[name] for name in model.get_classifier(name_only=True)] == list(classifiers) and len(classifiers) == 3
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resizes_its_head(name):
    model = timm.create_model(name, device="meta", num_classes=7, in_chans=1, router=True)
    assert all(head.weight.shape[0] == 7 for head in model.get_classifier()) and model.router.top_choices_num == 5
    model.reset_classifier(13)
    x = torch.empty(2, 1, *model.pretrained_cfg["input_size"][1:], device="meta")
    assert model(x).shape == (2, 13) and model.num_classes == 13


def test_authors_widths():
    def planes(name, **kwargs):
        model = timm.create_model(name, device="meta", **kwargs)
        return [info["num_chs"] // (3 if "experts" in info["module"] else 1) for info in model.feature_info]

    assert planes("ride_resnet50") == [64, 256, 512, 768, 1536]
    assert planes("ride_resnet50", reduce_dimension=False) == [64, 256, 512, 1024, 2048]
    assert planes("ride_resnet10") == [64, 64, 128, 192, 384]
    assert planes("ride_resnet32") == [16, 16, 24, 48]
    assert planes("ride_resnet32", reduce_dimension=False) == [16, 16, 32, 64]
    assert planes("ride_resnet32", layer2_output_dim=20, layer3_output_dim=40) == [16, 16, 20, 40]
    assert planes("ride_resnet10", layer3_output_dim=100, layer4_output_dim=200) == [64, 64, 128, 100, 200]
    block = timm.create_model("ride_resnext50", device="meta").experts[0].stages.layer3[0]
    assert block.conv2.groups == 32 and block.conv2.out_channels == 384


# The ensemble


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [False, True])
def test_the_ensemble_is_the_mean_of_the_experts(name, training):
    model, x = build(name).train(training), images(name)
    features, expert_logits = model.forward_experts(x)
    torch.testing.assert_close(model(x), expert_logits.mean(1), rtol=1e-5, atol=1e-5)
    for i, expert in enumerate(model.experts):
        torch.testing.assert_close(expert.fc(features[:, i]), expert_logits[:, i])


def test_permuting_the_experts_leaves_the_ensemble_unchanged():
    model, x = build(num_experts=4), images()
    before, by_expert = model(x), model.forward_experts(x)[1]
    order = [2, 0, 3, 1]
    model.experts = nn.ModuleList(model.experts[i] for i in order)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model.forward_experts(x)[1], by_expert[:, order])


def test_use_experts_picks_a_subset():
    model, x = build(), images()
    features, logits = model.forward_experts(x)
    for chosen in ([1], [2, 0], [0, 1, 2]):
        some_features, some_logits = model.forward_experts(x, use_experts=chosen)
        torch.testing.assert_close(some_features, features[:, chosen], rtol=0, atol=0)
        torch.testing.assert_close(some_logits, logits[:, chosen], rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(model.forward_experts(x), (features, logits), strict=True))


@pytest.mark.parametrize("use_norm", [True, False])
def test_one_expert_is_the_plain_network(use_norm):
    model, x = build(num_experts=1, use_norm=use_norm), images()
    expert = model.experts[0]
    pooled = expert.stages(model.trunk(x)).mean((2, 3))
    plain = expert.fc(pooled)
    features, logits = model.forward_experts(x)
    torch.testing.assert_close(model(x), plain)
    torch.testing.assert_close(logits, plain[:, None])
    torch.testing.assert_close(features, pooled[:, None])


def test_one_expert_at_full_width_is_timms_resnet():
    ours = build("ride_resnet50", num_experts=1, reduce_dimension=False, use_norm=False)
    theirs = timm.create_model("resnet50", num_classes=11).eval()
    state = {key.replace("trunk.", "").replace("experts.0.stages.", ""): v for key, v in ours.state_dict().items()}
    theirs.load_state_dict({key.replace("experts.0.", ""): value for key, value in state.items()})
    x = images(size=64, B=2)
    torch.testing.assert_close(ours(x), theirs(x))


def test_cosine_logits_are_scaled_cosines():
    head = CosineClassifier(6, 4)
    x = torch.randn(5, 6)
    for b in range(5):
        for c in range(4):
            cosine = F.cosine_similarity(x[b], head.weight[c], dim=0)
            torch.testing.assert_close(head(x)[b, c], 30 * cosine)
    torch.testing.assert_close(head(7 * x), head(x))


# Routing


def brute_force(model: Ride, x, threshold: float):
    """Every expert on every image, then one image and one gate at a time."""
    features, logits = model.forward_experts(x)
    outputs, counts = [], []
    for b in range(len(x)):
        used = 1
        while used < model.num_experts:
            mean = logits[b, :used].mean(0)
            top = sorted(mean.tolist(), reverse=True)[: model.router.top_choices_num]
            unit = features[b, used - 1] / features[b, used - 1].norm()
            hidden = (model.router.hidden[used - 1](unit)).clamp(min=0)
            fc = model.router.fc[0 if model.router.share_expert_help_pred_fc else used - 1]
            inputs = top + hidden.tolist()
            gate = sum(w * v for w, v in zip(fc.weight[0].tolist(), inputs, strict=True)) + fc.bias.item()
            if not 1 / (1 + math.exp(-gate)) > threshold:
                break
            used += 1
        outputs.append(logits[b, :used].mean(0))
        counts.append(used)
    return torch.stack(outputs), torch.tensor(counts)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
def test_sparse_routing_equals_computing_all_and_masking(routed, threshold):
    model, x = routed
    with torch.no_grad():
        expected, counts = brute_force(model, x, threshold)
        logits, used = model.forward_routed(x, threshold)
    assert used.tolist() == counts.tolist()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    kinds = set(used.tolist())
    assert kinds == {0.0: {3}, 0.5: {1, 2, 3}, 1.0: {1}}.get(threshold, kinds)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_experts_run_only_on_the_samples_sent_to_them(routed, threshold):
    model, x = routed
    rows = [0] * model.num_experts
    hooks = []
    for i, expert in enumerate(model.experts):

        def count(module, args, i=i):
            rows[i] += len(args[0])

        hooks.append(expert.stages.register_forward_pre_hook(count))
    with torch.no_grad():
        used = model.forward_routed(x, threshold)[1]
    for hook in hooks:
        hook.remove()
    assert rows == [int((used > i).sum()) for i in range(model.num_experts)]


def test_one_image_and_no_image_route_too(routed):
    model, x = routed
    logits, used = model.forward_routed(x)
    for b in (0, 5):
        alone, own = model.forward_routed(x[b : b + 1])
        assert own.item() == used[b].item()
        torch.testing.assert_close(alone[0], logits[b], rtol=1e-9, atol=1e-9)
    empty, none = model.forward_routed(x[:0])
    assert empty.shape == (0, 11) and none.shape == (0,)


def test_routed_at_construction_routes_in_eval_mode_only():
    x = images()
    plain, model = build(router=True), build(router=True, routed=True)
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for net in (plain, model):
            net.router.fc[0].bias.fill_(-100.0)  # nobody goes on
    torch.testing.assert_close(model(x), model.forward_experts(x)[1][:, 0])
    torch.testing.assert_close(plain(x), plain.forward_experts(x)[1].mean(1))
    model.train()
    torch.testing.assert_close(model(x), model.forward_experts(x)[1].mean(1), rtol=1e-5, atol=1e-5)


def test_a_router_is_added_in_the_models_dtype_and_mode():
    model = build().double()
    model.add_router(Router(3, model.head_hidden_size // 3, 11))
    logits, used = model.forward_routed(images(dtype=torch.float64))
    assert logits.dtype == torch.float64 and logits.shape == (4, 11) and used.dtype == torch.int64


def test_the_last_gate_layer_can_be_shared_or_not():
    for shared, num in ((True, 1), (False, 3)):
        router = build(num_experts=4, router=True, share_expert_help_pred_fc=shared).router
        assert len(router.fc) == num and len(router.hidden) == 3 and router.share_expert_help_pred_fc is shared


# Bad arguments


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(num_experts=0), ValueError, "num_experts=0"),
        (dict(num_experts=True), ValueError, "num_experts=True"),
        (dict(num_experts=-2), ValueError, "num_experts=-2"),
        (dict(num_experts=1.5), ValueError, "num_experts=1.5"),
        (dict(num_classes=-1), ValueError, "num_classes=-1: expected 0 or more"),
        (dict(routed=True), ValueError, "routed=True needs a router"),
        (dict(global_pool=""), ValueError, "global_pool='' with num_classes=.*: pooling can be left out with"),
        (dict(router=True, num_experts=1), ValueError, "at least 2"),
        (dict(router=True, top_choices_num=0), ValueError, "top_choices_num=0"),
        (dict(num_expert=3), TypeError, "num_expert"),
    ],
)
@pytest.mark.parametrize("name", ["test_ride_resnet", "ride_resnet32"])
def test_bad_arguments_are_named(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


@pytest.mark.parametrize("kwargs", [dict(layer2_output_dim=8), dict(layer3_output_dim=20), dict(layer2_output_dim=64)])
def test_the_cifar_network_cannot_narrow(kwargs):
    with pytest.raises(ValueError, match=r"layer[23]_output_dim=\d+: option-A shortcuts only widen"):
        timm.create_model("ride_resnet32", **kwargs)


@pytest.mark.parametrize(
    ("name", "foreign"), [("ride_resnet32", "share_layer3"), ("ride_resnet10", "layer2_output_dim")]
)
def test_arguments_of_the_other_family_are_unknown(name, foreign):
    with pytest.raises(TypeError, match=foreign):
        timm.create_model(name, **{foreign: 1})


def test_routing_without_a_router_is_an_error():
    with pytest.raises(RuntimeError, match="has no router"):
        build().forward_routed(images())


def test_top_choices_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match=r"top_choices_num=30 is above the number of classes: using 11"):
        model = build(router=True, top_choices_num=30)
    assert model.router.top_choices_num == 11
    assert model.forward_routed(images())[0].shape == (4, 11)


# timm's contract


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
    with pytest.raises(ValueError, match="pooling can be left out"):
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
    assert model.num_classes == 11 and model(x).shape == (4, 11)  # as it was


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
    ],
)
def test_a_saved_model_comes_back_through_timm(tmp_path, name, kwargs):
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
    if kwargs.get("router"):  # it read the old logits
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
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.5)  # of cosines times 30


def test_routing_runs_under_autocast(routed):
    model, x = copy.deepcopy(routed[0]).float(), routed[1].float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, used = model.forward_routed(x)
    assert torch.isfinite(logits).all() and set(used.tolist()) <= {1, 2, 3} and len(set(used.tolist())) > 1


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


def test_layer3_can_be_shared():
    own, shared = build("ride_resnet10"), build("ride_resnet10", share_layer3=True)
    assert [name for name, _ in shared.trunk.named_children()][-1] == "layer3"
    assert [name for name, _ in shared.experts[0].stages.named_children()] == ["layer4"]
    count = {key: sum(p.numel() for p in m.parameters()) for key, m in (("own", own), ("shared", shared))}
    layer3 = sum(p.numel() for p in own.experts[0].stages.layer3.parameters())
    assert count["own"] - count["shared"] == 2 * layer3
    assert shared(images(size=64)).shape == (4, 11)
    assert [info["module"] for info in shared.feature_info][3:] == ["trunk.layer3", "experts.0.stages.layer4"]


# Initialisation


def check_convolutions(model: Ride, fan_of) -> None:
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 2000:
            std = math.sqrt(2 / fan_of(module))
            error = 4 / math.sqrt(2 * module.weight.numel())  # four standard errors of a standard deviation
            assert abs(module.weight.std().item() / std - 1) < error, name
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(module.weight.numel()), name
            assert module.weight.abs().max() > 3 * std, name  # normal, not uniform
            seen += 1
    assert seen > 5
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name


@pytest.mark.parametrize("name", ["ride_resnet10", "ride_resnext50"])
def test_imagenet_networks_start_he_normal_by_fan_out(name):
    model = build(name, router=True, use_norm=False, num_classes=300)
    check_convolutions(model, lambda conv: conv.out_channels * conv.kernel_size[0] ** 2)
    for layer in [*model.get_classifier(), *model.router.hidden, *model.router.fc]:  # torch's default: uniform
        bound = 1 / math.sqrt(layer.in_features)
        assert layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
        assert layer.weight.abs().max() > 0.8 * bound


def test_cifar_network_starts_he_normal_by_fan_in():
    model = build("ride_resnet32", router=True, use_norm=False, num_classes=300)

    def check_linear():
        for layer in [*model.get_classifier(), *model.router.hidden]:
            std = math.sqrt(2 / layer.in_features)
            assert abs(layer.weight.std().item() / std - 1) < 4 / math.sqrt(2 * layer.weight.numel())
            assert layer.weight.abs().max() > 1.8 * std  # a uniform distribution ends at 1.73
        assert model.router.fc[0].weight.std() > 1 / math.sqrt(model.router.fc[0].in_features)

    check_convolutions(model, lambda conv: conv.in_channels * conv.kernel_size[0] ** 2)
    check_linear()
    model.reset_classifier(200)
    check_linear()
    model.add_router(Router(3, 48, 200))
    check_linear()


@pytest.mark.parametrize("name", SMALL)
def test_class_vectors_start_on_the_unit_sphere_and_experts_differ(name):
    model = build(name, num_classes=40)
    for head in model.get_classifier():
        torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(40))
        assert head.weight.mean().abs() < 0.05 and (head.weight < 0).any()
    for key, first in model.experts[0].named_parameters():
        if first.ndim > 1:
            assert all(not torch.equal(first, dict(e.named_parameters())[key]) for e in model.experts[1:]), key


def test_the_seed_decides_the_weights():
    one, same, other = (build(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert not torch.equal(one["trunk.conv1.weight"], other["trunk.conv1.weight"])

import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from small_networks import SMALL, build, images
from torch import nn

from ride_timm.models import CosineClassifier, Experts, Ride, Router

PARAMS = json.loads((Path(__file__).parents[1] / "parity" / "params_100classes.json").read_text())
RIDE_NAMES = timm.list_models("ride_resn*")
NAMES = [*RIDE_NAMES, "test_ride_resnet"]


def settle(model: Ride, batch) -> Ride:
    """Set the running statistics to this batch.

    An untrained network then separates images in eval mode.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model.forward_experts(batch)
    return model.eval()


@pytest.fixture(scope="module")
def routed() -> tuple[Ride, torch.Tensor]:
    """A tiny float64 model whose gates pass about half of the samples; its batch."""
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
        medians = model.router(*model.forward_experts(batch)).quantile(0.5, 0)  # between two images
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


def test_registered_names():
    family = ["10", "50", "101", "152", "32"]
    assert set(RIDE_NAMES) == {f"ride_resnet{n}" for n in family} | {f"ride_resnext{n}" for n in ("50", "101", "152")}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_and_returns_logits(name):
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


@pytest.mark.parametrize(("name", "layer", "own"), [("ride_resnet10", 3, [4]), ("ride_resnet32", 2, [3])])
def test_a_further_layer_can_be_shared(name, layer, own):
    alone, shared = build(name), build(name, **{f"share_layer{layer}": True})
    assert [child for child, _ in shared.trunk.named_children()][-1] == f"layer{layer}"
    assert [child for child, _ in shared.experts[0].stages.named_children()] == [f"layer{i}" for i in own]
    count = [sum(p.numel() for p in m.parameters()) for m in (alone, shared)]
    saved = sum(p.numel() for p in alone.experts[0].stages.get_submodule(f"layer{layer}").parameters())
    assert count[0] - count[1] == 2 * saved
    assert shared(images(name)).shape == (4, 11)
    modules = [info["module"] for info in shared.feature_info]
    assert modules[-2:] == [f"trunk.layer{layer}", f"experts.0.stages.layer{own[0]}"]


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
    model.experts = Experts(model.experts[i] for i in order)
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
    """Run every expert on every image, then decide image by image and gate by gate."""
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
def test_sparse_routing_equals_masked_dense(routed, threshold):
    model, x = routed
    with torch.no_grad():
        expected, counts = brute_force(model, x, threshold)
        logits, used = model.forward_routed(x, threshold)
    assert used.tolist() == counts.tolist()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    kinds = set(used.tolist())
    assert kinds == {0.0: {3}, 0.5: {1, 2, 3}, 1.0: {1}}.get(threshold, kinds)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_small_batches_are_masked_where_asked(routed, threshold):
    model, x = routed
    with torch.no_grad():
        expected, counts = model.forward_routed(x, threshold)
        logits, used = model.forward_routed(x, threshold, masked_below=len(x) + 1)
        sparse = model.forward_routed(x, threshold, masked_below=len(x))[0]
        empty, none = model.forward_routed(x[:0], masked_below=1)
    assert torch.equal(used, counts) and torch.equal(sparse, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert empty.shape == (0, 11) and none.shape == (0,)


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


def test_one_image_or_none_can_be_routed(routed):
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
            net.router.fc[0].bias.fill_(-100.0)  # no sample continues
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


def test_routing_runs_under_autocast(routed):
    model, x = copy.deepcopy(routed[0]).float(), routed[1].float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, used = model.forward_routed(x)
    assert torch.isfinite(logits).all() and set(used.tolist()) <= {1, 2, 3} and len(set(used.tolist())) > 1


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
        (dict(global_pool=""), ValueError, "global_pool='' with num_classes=.*: only num_classes=0"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_a_gpu_routes_as_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = build(name, num_experts=3, router=True), images(name, B=16)
    gates = model.router(*model.forward_experts(x)).sigmoid()[:, 0].sort().values
    threshold = gates[7:9].mean().item()
    with torch.inference_mode():
        logits, used = model.forward_routed(x, threshold)
        on_gpu = model.cuda().forward_routed(x.cuda(), threshold)
    torch.testing.assert_close(on_gpu[1].cpu(), used)
    torch.testing.assert_close(on_gpu[0].cpu(), logits, rtol=1e-4, atol=1e-4)

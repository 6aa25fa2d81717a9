import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from small_backbones import build, images
from torch.utils.flop_counter import FlopCounterMode

import ride_timm  # noqa: F401  (registers the models)
from ride_timm.errors import InputError
from ride_timm.evaluation.macs import Macs, count_macs
from ride_timm.models import CosineClassifier

GOLDENS = json.loads((Path(__file__).parents[1] / "parity" / "gflops.json").read_text())
DATA = {"0": (1000, 224), "1": (8142, 224), "2": (100, 32)}  # ImageNet-LT, iNaturalist 2018, CIFAR100-LT


def read(row):
    """A command line of the original counter -> (name, kwargs, size, experts used or None)"""
    cls, data, *flags = row["args"]
    flags = dict(zip(flags[::2], flags[1::2], strict=True))
    num_classes, size = DATA[data]
    kwargs = dict(
        num_classes=num_classes,
        num_experts=int(flags["--num_experts"]),
        reduce_dimension=flags.get("--reduce_dim") == "True",
        use_norm=flags.get("--use_norm") == "True",
        router="EA" in cls,
    )
    used = [float(part) / 100 for part in flags["--ea_percentage"].split(",")] if "--ea_percentage" in flags else None
    return "ride_" + cls.replace("EA", "").replace("Model", "").lower(), kwargs, size, used


@pytest.mark.parametrize("row", GOLDENS, ids=lambda row: "-".join(row["args"]).replace("--", ""))
def test_macs_are_the_authors(row):
    name, kwargs, size, used = read(row)
    model = timm.create_model(name, **kwargs)
    macs = count_macs(model, (3, size, size))
    ours = macs.expected(used) if used else macs.ensemble
    theirs = 1e9 * row["macs_G"]
    if kwargs["use_norm"] and kwargs["num_experts"] > 1 and not kwargs["router"]:
        # their counter skips the cosine heads of these networks; nothing else may differ
        theirs += sum(head.in_features * head.out_features for head in model.get_classifier())
        assert ours == pytest.approx(theirs, abs=1)
    elif not kwargs["router"]:
        # 64 operations apart in 70 million where one cosine head is counted, as many as it has features
        assert ours == pytest.approx(theirs, abs=64)
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.fixture(scope="module")
def tiny():
    model = timm.create_model("test_ride_resnet", num_classes=7, router=True, top_choices_num=3)
    return model, count_macs(model, (3, 64, 64))


def test_parts_add_up(tiny):
    model, macs = tiny
    assert macs.ensemble == macs.trunk + sum(macs.experts)
    assert macs.experts[0] == macs.experts[1] == macs.experts[2] and len(macs.gates) == 2
    # after 64 x 64: layer3 at 4 x 4 and layer4 at 2 x 2, each of two 3x3 convolutions and a 1x1 shortcut
    layer3 = 4 * 4 * (128 * 24 * 9 + 24 * 24 * 9 + 128 * 24)
    layer4 = 2 * 2 * (24 * 32 * 9 + 32 * 32 * 9 + 24 * 32)
    assert layer3 + layer4 + 32 * 7 <= macs.experts[0] <= 1.02 * (layer3 + layer4 + 32 * 7)  # BatchNorm and pooling
    assert macs.gates[0] == 32 * 16 + 3 + 16
    assert macs.params == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("used", [(1, 0, 0), (0, 0, 1), (0.5, 0.2, 0.3), (0.4099, 0.0947, 0.4954)])
def test_expected_macs_follow_the_experts_used(tiny, used):
    macs = tiny[1]
    trunk, (first, second, third), (gate1, gate2) = macs.trunk, macs.experts, macs.gates
    alone = trunk + first + gate1
    by_count = (alone, alone + second + gate2, alone + second + gate2 + third)
    expected = sum(fraction * cost for fraction, cost in zip(used, by_count, strict=True))
    assert macs.expected(used) == pytest.approx(expected, rel=1e-12)


def test_expected_macs_with_numbers():
    macs = Macs(trunk=100.0, experts=(10.0, 20.0, 40.0), gates=(1.0, 2.0), params=0)
    assert macs.ensemble == 170
    assert macs.expected([0.5, 0.25, 0.25]) == 100 + 10 + 1 + 0.5 * (20 + 2) + 0.25 * 40
    assert Macs(100.0, (10.0, 20.0), (), 0).expected([0.5, 0.5]) == 120


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ((1,), "1 fractions for 3 experts"),
        ((0.5, 0.25, 0.2, 0.05), "4 fractions for 3 experts"),
        ((0.5, 0.5, 0.5), "expected fractions that sum to 1"),
        ((40.99, 9.47, 49.54), "expected fractions that sum to 1"),
        ((1.2, -0.2, 0), "expected fractions that sum to 1"),
        ((0.5, math.nan, 0.5), "expected fractions that sum to 1"),
        ((math.nan,) * 3, "expected fractions that sum to 1"),
        ((math.inf, 0, 0), "expected fractions that sum to 1"),
    ],
)
def test_bad_fractions_are_named(tiny, used, message):
    with pytest.raises(InputError, match=message):
        tiny[1].expected(used)


def test_counting_leaves_the_model_as_it_was(tiny):
    model = tiny[0].train().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    names = {name for name, _ in model.named_buffers()}
    count_macs(model, (3, 32, 32))
    assert model.training and {name for name, _ in model.named_buffers()} == names
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_heads_count_with_and_without_the_norm():
    cosine, linear = (timm.create_model("test_ride_resnet", num_classes=9, use_norm=norm) for norm in (True, False))
    assert isinstance(cosine.get_classifier()[0], CosineClassifier)
    assert count_macs(cosine, (3, 32, 32)).ensemble == count_macs(linear, (3, 32, 32)).ensemble


def test_a_network_without_classes_can_be_counted():
    with_head, without = (timm.create_model("test_ride_resnet", num_classes=n) for n in (9, 0))
    difference = count_macs(with_head, (3, 32, 32)).ensemble - count_macs(without, (3, 32, 32)).ensemble
    assert difference == 3 * 32 * 9


@pytest.mark.parametrize(
    "backbone",
    ["test_nfnet", "beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256", "test_vit",
     "resnetv2_50", "test_efficientnet", "regnety_002"],
)  # fmt: skip
def test_no_layer_of_a_backbone_is_overlooked(backbone):
    model = build(backbone, num_experts=2)
    check_against_torch(model, images(backbone, 1))


@pytest.mark.parametrize("backbone", ["resnetv2_50x1_bit", "tf_mobilenetv3_small_minimal_100"])
def test_convolutions_of_timm_count_as_convolutions(backbone):
    with torch.device("meta"):
        model = timm.create_model("ride", backbone=backbone, num_classes=7, num_experts=1)
    check_against_torch(model, torch.zeros(1, 3, 64, 64, device="meta"))


def check_against_torch(model, x):
    """All products with weights as torch itself counts them; thop adds norms and pooling, a few percent at most."""
    model = model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(x)
    aten = torch.ops.aten
    found = counter.get_flop_counts()["Global"]
    theirs = sum(found.get(op, 0) for op in (aten.convolution, aten.addmm, aten.mm)) / 2
    assert 0.9999 * theirs <= count_macs(model, x.shape[1:]).ensemble <= 1.05 * theirs


@pytest.mark.parametrize(
    ("kwargs", "mmacs"),
    [
        (dict(), 102.2),
        (dict(share_layer2=True, layer3_output_dim=56), 99.8),
        (dict(share_layer2=True, num_experts=4, layer3_output_dim=48), 99.3),
        (dict(share_layer2=True, num_experts=5, layer3_output_dim=44), 102.3),
    ],
)
def test_experts_of_full_width_on_a_shared_layer2_cost_what_three_narrow_ones_do(kwargs, mmacs):
    model = timm.create_model("ride_resnet32", **(dict(reduce_dimension="share_layer2" not in kwargs) | kwargs))
    assert round(count_macs(model.eval(), (3, 32, 32)).ensemble / 1e6, 1) == mmacs

"""Models built from recipes."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ride_timm import InputError
from ride_timm.training import build
from ride_timm.training.build import create_model, reorder_classes
from ride_timm.training.options import parse_arguments
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState

SHAPE = dict(input_size=(3, 28, 28), mean=(0.3,) * 3, std=(0.4,) * 3, crop_pct=1.0, interpolation="bilinear")
TINY = Recipe(model="test_ride_resnet", num_experts=2)


def test_create_model_is_seeded_and_takes_weights(tmp_path):
    first, second = create_model(TINY, 5), create_model(TINY, 5)
    other = create_model(TINY.override({"seed": 1}), 5)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.trunk.conv1.weight, other.trunk.conv1.weight)
    folder = RunFolder(tmp_path / "run")
    folder.begin(TINY, TrainingState())
    folder.export(other, SHAPE, tuple("abcde"))
    started = create_model(TINY, 5, str(folder.path))
    assert torch.equal(started.trunk.conv1.weight, other.trunk.conv1.weight)
    with pytest.raises(InputError, match=r"holds another model than the recipe's"):
        create_model(TINY.override({"num_experts": 3}), 5, str(folder.path))


@torch.no_grad()
@pytest.mark.parametrize("affine", [False, True])
def test_the_classifiers_of_a_source_take_the_order_of_the_data(tmp_path, affine):
    source, images = create_model(TINY, 3), torch.randn(2, 3, 32, 32)
    if affine:
        source.add_class_affine()
        source.experts[0].fc.affine.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    RunFolder(tmp_path).export(source, dict(input_size=(3, 32, 32)), ("a", "b", "c"))
    found = create_model(TINY, 3, str(tmp_path), names=("C", "a", "b")).eval()
    expected = source.eval().forward_experts(images)[1][:, :, [2, 0, 1]]
    assert torch.equal(found.forward_experts(images)[1], expected)


@torch.no_grad()
def test_of_an_mlp_the_last_layer_takes_the_order_of_the_classes():
    model, images = create_model(TINY, 3).eval(), torch.randn(2, 3, 32, 32)
    for expert in model.experts:
        width = expert.fc.in_features
        expert.fc = nn.Sequential(nn.Linear(width, 2), nn.LayerNorm(2), nn.Linear(2, 3))
    before = model.forward_experts(images)[1]
    reorder_classes(model, [2, 0, 1])
    assert torch.equal(model.forward_experts(images)[1], before[:, :, [2, 0, 1]])


@pytest.mark.parametrize(
    ("available", "counts", "change"),
    [
        (54, [30, 16], "3 classes, 2 then"),
        (54, [30, 15, 9], "class 'class1' has 16 images, 15 then, class 'class2' has 8 images, 9 then"),
        (55, [30, 16, 8], "54 images to select from, 55 then"),
    ],
)
def test_a_resumed_run_has_the_data_it_began_with(colours, available, counts, change):
    recipe = TINY.override(dict(dataset=str(colours), imb_type="none", augment="cifar"))
    accelerator = Accelerator(cpu=True)
    state = TrainingState(epoch=1, contents=build.load_data(recipe, accelerator).contents)
    assert build.load_data(recipe, accelerator, state).contents == dict(available=54, class_counts=[30, 16, 8])
    state.contents = dict(available=available, class_counts=counts)
    with pytest.raises(InputError, match=rf"changed since the run began: {change}; restore them, or choose another"):
        build.load_data(recipe, accelerator, state)
    state.epoch = 0  # begins again
    assert build.load_data(recipe, accelerator, state).num_classes == 3


@pytest.mark.parametrize(("backbone", "size"), [("test_vit", 64), ("test_vit", 160), ("test_resnet", 64)])
def test_fixed_size_backbones_are_built_for_the_image_size(backbone, size):
    model = create_model(Recipe(model="ride", backbone=backbone, num_experts=2), 5, size=size).eval()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 5)
    assert model._model_args.get("img_size") == (size if backbone == "test_vit" else None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "ride", "backbone": "test_vitt"}, r"model ride: backbone='test_vitt': timm has no such model"),
        ({"model": "ride", "backbone": "test_vit", "split": "blocks.99"}, r"split='blocks.99': test_vit can be split"),
        ({"model": "resnet18"}, r"model='resnet18': not a network with experts; expected one of .*ride_resnet10"),
        ({"model": "nope"}, r"model='nope'"),
        ({"model": "ride_resnet32", "share_layer3": True}, r"ride_resnet32: it does not take 'share_layer3'"),
        ({"model": "ride_resnet32", "layer2_output_dim": 8}, r"layer2_output_dim=8"),
    ],
)
def test_create_model_errors(values, message):
    with pytest.raises(InputError, match=message):
        create_model(Recipe(**values), 5)


def test_a_precision_that_the_device_lacks_is_named(monkeypatch):
    def lacking(**how):
        raise ValueError("bf16 mixed precision requires PyTorch >= 1.10 and a supported device.")

    monkeypatch.setattr(build, "Accelerator", lacking)
    recipe = load_recipe("cifar100_lt").override(dict(mixed_precision="bf16"))
    with pytest.raises(
        InputError, match=r"^mixed_precision=bf16: this device does not have it; pass --mixed-precision"
    ):
        build.build_accelerator(recipe, parse_arguments([])[0])

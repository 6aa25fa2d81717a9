"""Initialisation of the networks: distributions of the weights, and the seed."""

import math

import pytest
import torch
from small_networks import SMALL, build
from torch import nn

from ride_timm.models import Ride, Router


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

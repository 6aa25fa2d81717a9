"""Fused blocks and experts in step: the same numbers as blocks and experts one by one."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import timm
import torch
from channels import channels_last
from timm.models.resnet import BasicBlock
from torch import nn

from ride_timm.models.fused.blocks import FusedBlock, FusedStage, forward_blocks, forward_together, fuse_norm_relu
from ride_timm.training.ghost_batches import forward_in_parts


@pytest.mark.parametrize("name", ["ride_resnet32", "test_ride_resnet"])
def test_a_network_trains_alike(uncompiled, name):
    """Logits, gradients, statistics of a fused network; float64 tells how far float32 itself is off."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    fused, exact = deepcopy(plain), deepcopy(plain).double()
    assert fused.fuse_training() == sum(isinstance(module, BasicBlock) for module in plain.modules()) > 0
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    images = channels_last(6, 3, 32, 32)
    found = {}
    for label, model in (("plain", plain), ("fused", fused), ("exact", exact)):
        logits = model.forward_experts(images.to(next(model.parameters()).dtype))[1]
        logits.square().mean().backward()
        found[label] = [logits, *(p.grad for p in model.parameters()), *model.buffers()]
    for plainly, fusedly, exactly in zip(*found.values(), strict=True):
        off = (plainly.double() - exactly.double()).norm().item()
        scale = exactly.double().norm().item()
        assert (fusedly.double() - exactly.double()).norm().item() <= 10 * off + 1e-3 * scale
    plain.load_state_dict(fused.state_dict())
    assert torch.equal(plain.eval()(images), fused.eval()(images))


def test_under_torch_compile_the_compiler_sees_the_modules():
    torch.manual_seed(0)
    plain = nn.Sequential(BasicBlock(32, 32)).to(memory_format=torch.channels_last)
    fused = deepcopy(plain)
    model = nn.Sequential(OrderedDict(stage=fused))
    assert fuse_norm_relu(model) == 1
    x = channels_last(2, 32, 4, 4)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), plain(x))


@pytest.mark.parametrize("name", ["ride_resnet32", "test_ride_resnet"])
def test_experts_in_step(uncompiled, name):
    """What each expert alone makes of the trunk's map, and the gradients with it: in float64, so by plain modules."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last).double()
    alone, together = deepcopy(model), deepcopy(model)
    assert together.fuse_training() and together.together
    images = channels_last(4, 3, 32, 32).double()
    found = []
    for one_by_one, net in ((True, alone), (False, together)):
        x = net.trunk(images)
        both = [e.forward_both(x) for e in net.experts] if one_by_one else forward_together(net.experts, x)
        sum(logits.square().mean() for _, logits in both).backward()
        found.append([*(value for pair in both for value in pair), *(p.grad for p in net.parameters()), *net.buffers()])
    for wanted, value in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("use_experts", [[1], [2, 0], [0, 0]])
def test_some_experts_in_step(uncompiled, use_experts):
    torch.manual_seed(0)
    plain = timm.create_model("ride_resnet32").to(memory_format=torch.channels_last)
    fused = deepcopy(plain)
    fused.fuse_training()
    images = channels_last(4, 3, 16, 16)
    expected, found = (net.forward_experts(images, use_experts)[1] for net in (plain, fused))
    assert found.shape == (4, len(use_experts), 100)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for wanted, value in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3)


def test_ghost_batches_in_step(uncompiled):
    torch.manual_seed(0)
    plain = timm.create_model("ride_resnet32").to(memory_format=torch.channels_last)
    fused = deepcopy(plain)
    fused.fuse_training()
    images = channels_last(4, 3, 16, 16)
    logits = [
        forward_in_parts(lambda part, net=net: net.forward_experts(part)[1], net, images, 2) for net in (plain, fused)
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    for wanted, value in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3)


def test_a_frozen_expert_in_step(uncompiled):
    model = timm.create_model("ride_resnet32").to(memory_format=torch.channels_last)
    model.fuse_training()
    model.experts[0].requires_grad_(False)
    model.experts[1].stages[0][1].bn1.eval()  # and a norm that keeps its statistics
    model.forward_experts(channels_last(2, 3, 16, 16))[1].square().mean().backward()
    assert all(parameter.grad is None for parameter in model.experts[0].parameters())
    assert all(parameter.grad is not None for parameter in model.experts[1].parameters())
    assert model.experts[1].stages[0][1].bn1.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "kwargs", "together", "num_blocks"),
    [
        ("ride_resnet32", {}, True, 35),
        ("ride_resnet32", {"num_experts": 1}, False, 15),
        ("test_ride_resnet", {}, True, None),
        ("ride_resnet32", {"drop_path_rate": 0.5}, False, None),  # its later blocks are no plain ones
        ("ride", {"backbone": "resnet18"}, False, None),  # its stages are those of timm's network
        ("ride", {"backbone": "test_vit", "img_size": 32}, False, 0),
    ],
)
def test_who_goes_together(name, kwargs, together, num_blocks):
    model = timm.create_model(name, **kwargs)
    found = model.fuse_training()
    assert model.together is together and (found == num_blocks if num_blocks is not None else found > 0)
    assert model.fuse_training() == 0 and model.together is together


def test_another_backbones_blocks_train_fused(uncompiled):
    torch.manual_seed(0)
    plain = timm.create_model("ride", backbone="resnet10t", num_experts=2).to(memory_format=torch.channels_last)
    fused = deepcopy(plain)
    assert fused.fuse_training()
    images = channels_last(4, 3, 64, 64)
    expected, found = (net.forward_experts(images)[1] for net in (plain, fused))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_experts_that_differ_go_one_by_one():
    model = timm.create_model("ride_resnet32")
    model.experts[1].stages[0][2].bn1.momentum = 0.3
    assert model.fuse_training() and not model.together


def test_stages_keep_their_names_and_modes():
    model = timm.create_model("ride_resnet32")
    model.experts[0].stages.layer2[1].eval()
    frozen = model.experts[1].stages.layer2[1].bn2.eval()
    names = [name for name, _ in model.named_parameters()]
    model.fuse_training()
    assert names == [name for name, _ in model.named_parameters()]
    stage = model.experts[0].stages.layer2
    assert type(stage) is FusedStage and type(stage[4]) is FusedBlock
    assert stage.training and not stage[1].training and not frozen.training
    model.eval()
    x = channels_last(2, 16, 8, 8)
    torch.testing.assert_close(forward_blocks([stage], [x])[0], stage[4](stage[3](stage[2](stage[1](stage[0](x))))))


def test_only_plain_blocks_are_changed():
    plain, squeezed = BasicBlock(8, 8), BasicBlock(8, 8)
    squeezed.se = nn.Conv2d(8, 8, 1)
    model = nn.Sequential(plain, squeezed, BasicBlock(8, 8, act_layer=nn.SiLU))
    assert fuse_norm_relu(model) == 1 and isinstance(model[0], FusedBlock) and model[1] is squeezed

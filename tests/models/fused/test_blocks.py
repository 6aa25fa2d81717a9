"""Fused blocks and batched experts against the plain modules."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import timm
import torch
from channels import channels_last
from timm.models.resnet import BasicBlock
from torch import nn

from ride_timm.models import Experts
from ride_timm.models.fused import fuse
from ride_timm.models.fused.blocks import BatchedExperts, FusedBlock, FusedStage, forward_blocks, fuse_blocks
from ride_timm.training.ghost_batches import forward_in_parts


@pytest.mark.parametrize("name", ["ride_resnet32", "test_ride_resnet"])
def test_a_network_trains_alike(uncompiled, name):
    """A fused network is within float32's own error, measured by float64."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    fused, exact = deepcopy(plain), deepcopy(plain).double()
    assert fuse(fused) == sum(isinstance(module, BasicBlock) for module in plain.modules()) > 0
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
    assert fuse_blocks(model) == 1
    x = channels_last(2, 32, 4, 4)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), plain(x))


@pytest.mark.parametrize("name", ["ride_resnet32", "test_ride_resnet"])
def test_batched_experts(uncompiled, name):
    """Batched experts equal experts one by one; float64 takes the unfused path."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last).double()
    batched = deepcopy(model)
    assert fuse(batched) and type(batched.experts) is BatchedExperts
    images = channels_last(4, 3, 32, 32).double()
    found = []
    for net in (model, batched):
        features, logits = net.forward_experts(images)
        logits.square().mean().backward()
        found.append([features, logits, *(p.grad for p in net.parameters()), *net.buffers()])
    for wanted, value in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("use_experts", [[1], [2, 0], [0, 0]])
def test_some_experts_batched(uncompiled, use_experts):
    torch.manual_seed(0)
    plain = timm.create_model("ride_resnet32").to(memory_format=torch.channels_last)
    fused = deepcopy(plain)
    fuse(fused)
    images = channels_last(4, 3, 16, 16)
    expected, found = (net.forward_experts(images, use_experts)[1] for net in (plain, fused))
    assert found.shape == (4, len(use_experts), 100)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for wanted, value in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3)


def test_ghost_batches_with_batched_experts(uncompiled):
    torch.manual_seed(0)
    plain = timm.create_model("ride_resnet32").to(memory_format=torch.channels_last)
    fused = deepcopy(plain)
    fuse(fused)
    images = channels_last(4, 3, 16, 16)
    logits = [
        forward_in_parts(lambda part, net=net: net.forward_experts(part)[1], net, images, 2) for net in (plain, fused)
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    for wanted, value in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3)


def test_a_frozen_expert_among_batched_ones(uncompiled):
    model = timm.create_model("ride_resnet32").to(memory_format=torch.channels_last)
    fuse(model)
    model.experts[0].requires_grad_(False)
    model.experts[1].stages[0][1].bn1.eval()  # and a norm that keeps its statistics
    model.forward_experts(channels_last(2, 3, 16, 16))[1].square().mean().backward()
    assert all(parameter.grad is None for parameter in model.experts[0].parameters())
    assert all(parameter.grad is not None for parameter in model.experts[1].parameters())
    assert model.experts[1].stages[0][1].bn1.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "kwargs", "batched", "num_blocks"),
    [
        ("ride_resnet32", {}, True, 35),
        ("ride_resnet32", {"num_experts": 1}, False, 15),
        ("test_ride_resnet", {}, True, None),
        ("ride_resnet32", {"drop_path_rate": 0.5}, False, None),  # its later blocks have drop path
        ("ride", {"backbone": "resnet18"}, False, None),  # its stages are timm's network
        ("ride", {"backbone": "test_vit", "img_size": 32}, False, 0),
    ],
)
def test_experts_are_batched_where_they_are_alike(name, kwargs, batched, num_blocks):
    model = timm.create_model(name, **kwargs)
    expected = BatchedExperts if batched else Experts
    found = fuse(model)
    assert type(model.experts) is expected and (found == num_blocks if num_blocks is not None else found > 0)
    assert fuse(model) == 0 and type(model.experts) is expected


def test_another_backbones_blocks_train_fused(uncompiled):
    torch.manual_seed(0)
    plain = timm.create_model("ride", backbone="resnet10t", num_experts=2).to(memory_format=torch.channels_last)
    fused = deepcopy(plain)
    assert fuse(fused)
    images = channels_last(4, 3, 64, 64)
    expected, found = (net.forward_experts(images)[1] for net in (plain, fused))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_experts_that_differ_run_one_by_one():
    model = timm.create_model("ride_resnet32")
    model.experts[1].stages[0][2].bn1.momentum = 0.3
    assert fuse(model) and type(model.experts) is Experts


def test_stages_keep_their_names_and_modes():
    model = timm.create_model("ride_resnet32")
    model.experts[0].stages.layer2[1].eval()
    frozen = model.experts[1].stages.layer2[1].bn2.eval()
    names = [name for name, _ in model.named_parameters()]
    fuse(model)
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
    assert fuse_blocks(model) == 1 and isinstance(model[0], FusedBlock) and model[1] is squeezed

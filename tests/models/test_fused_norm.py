"""One pass for BatchNorm, shortcut and ReLU: the same numbers as the modules one by one."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from torch import nn

from ride_timm.launch import has_compiler
from ride_timm.models import forward_in_parts, fused_norm
from ride_timm.models.fused_norm import (
    FusedBlock,
    FusedStage,
    forward_blocks,
    forward_together,
    fuse_norm_relu,
    norm_relu,
)


def channels_last(*shape, dtype=torch.float32, generator=None):
    return torch.randn(*shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)


def judge(dtype, shape, with_shortcut, count=1, twice=False):
    """Outputs, gradients and running statistics of both ways: float64 modules, and the one-pass way in `dtype`.

    Of `count` maps at once; twice: each output has two uses of different gradients, and in ours a copy for each.
    """
    torch.manual_seed(0)

    def maps(scale=1, shift=0):
        return [(scale * channels_last(*shape) + shift).to(dtype) for _ in range(count)]

    xs, out_grads = maps(3, 5), [maps() for _ in range(1 + twice)]  # a mean to cancel against
    shortcuts = maps() if with_shortcut else []
    norms = [nn.BatchNorm2d(shape[1]) for _ in range(count)]
    for parameter in (parameter for norm in norms for parameter in norm.parameters()):
        nn.init.normal_(parameter)

    def results(norms, compute, *inputs):
        inputs = [[value.clone().requires_grad_() for value in values] for values in inputs]
        outs = compute(norms, *inputs)
        grads = [grad.to(outs[0].dtype) for of_use in out_grads for grad in of_use]
        torch.autograd.backward(outs, grads)
        grads = [value.grad for values in inputs for value in values]
        grads += [parameter.grad for norm in norms for parameter in norm.parameters()]
        return [*outs, *grads, *(buffer for norm in norms for buffer in norm.buffers())]

    def one_by_one(norms, xs, shortcuts):
        outs = [norm(x) for norm, x in zip(norms, xs, strict=True)]
        outs = [out + shortcut for out, shortcut in zip(outs, shortcuts, strict=True)] if shortcuts else outs
        return [F.relu(out) for out in outs] * (1 + twice)

    def at_once(norms, xs, shortcuts):
        return norm_relu(norms, xs, shortcuts or None, twice)

    wide = [[value.double() for value in values] for values in (xs, shortcuts)]
    expected = results([deepcopy(norm).double() for norm in norms], one_by_one, *wide)
    assert all(fused_norm._fits(norm, x, None) for norm, x in zip(norms, xs, strict=True))
    return expected, results(norms, at_once, xs, shortcuts)


def assert_as_exact(expected, found, tolerance):
    for wanted, value in zip(expected, found, strict=True):
        scale = wanted.double().abs().max().item()
        torch.testing.assert_close(value.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", [(4, 24, 8, 8), (3, 48, 4, 4), (2, 16, 6, 8), (5, 32, 1, 1), (2, 384, 7, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_same_numbers_as_in_float64(uncompiled, dtype, tolerance, shape, with_shortcut):
    expected, found = judge(dtype, shape, with_shortcut)
    assert found[0].dtype == dtype and found[0].is_contiguous(memory_format=torch.channels_last)
    assert_as_exact(expected, found, tolerance)


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_several_maps_at_once(uncompiled, with_shortcut, twice):
    assert_as_exact(*judge(torch.float32, (4, 24, 4, 4), with_shortcut, 3, twice), 1e-5)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "tolerance", "shape", "with_shortcut", "twice"),
    [
        (torch.float32, 1e-5, (4, 24, 4, 4), False, False),
        (torch.float32, 1e-5, (4, 24, 4, 4), True, True),
        (torch.bfloat16, 1e-2, (2, 384, 7, 7), True, False),  # two blocks
    ],
)
def test_compiled_passes_give_the_same(dtype, tolerance, shape, with_shortcut, twice):
    assert_as_exact(*judge(dtype, shape, with_shortcut, 2, twice), tolerance)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(("shift", "first", "tolerance"), [(1000, 0, 1e-4), (0, 3, 1e-5), (0, 30, 1e-3)])
def test_little_cancels_in_the_statistics(shift, first, tolerance):
    """Compiled, where sums run over 1,024 rows: far from zero, and with a first row off the others by deviations."""
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(16, momentum=1.0), channels_last(4, 16, 32, 32) + shift
    x[0, :, 0, 0] += first
    exact = deepcopy(norm).double()
    exact(x.double())
    norm_relu([norm], [x])
    torch.testing.assert_close(norm.running_mean.double(), exact.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), exact.running_var, rtol=tolerance, atol=0)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_once_for_a_shape(monkeypatch):
    compiled, compile_passes = [], fused_norm._compile
    monkeypatch.setattr(fused_norm, "_COMPILED", {})
    monkeypatch.setattr(fused_norm, "_compile", lambda *given: compiled.append(given) or compile_passes(*given))
    norm, x = nn.BatchNorm2d(32), channels_last(2, 32, 2, 2)
    for _ in range(2):
        norm_relu([norm], [x])
    assert len(compiled) == 2  # statistics and what they are for
    norm_relu([norm], [x[:, :, :1].contiguous(memory_format=torch.channels_last)])
    assert len(compiled) == 4
    assert norm.num_batches_tracked == 3 and not torch.equal(norm.running_mean, torch.zeros(32))


@pytest.mark.parametrize("case", ["eval", "layout", "dtype", "one value", "mean of all batches"])
def test_what_does_not_fit_goes_one_by_one(uncompiled, case):
    norm, shape = nn.BatchNorm2d(24), (1, 24, 1, 1) if case == "one value" else (4, 24, 4, 4)
    x = channels_last(*shape)
    if case == "eval":
        norm.eval()
    if case == "mean of all batches":
        norm.momentum = None
    if case == "layout":
        x = x.contiguous(memory_format=torch.contiguous_format)
    if case == "dtype":
        norm, x = norm.double(), x.double()
    assert not fused_norm._fits(norm, x, None)
    if case == "one value":
        with pytest.raises(ValueError, match="more than 1 value"):
            norm_relu([norm], [x])
    else:
        for out in norm_relu([norm], [x], twice=True):
            torch.testing.assert_close(out, F.relu(deepcopy(norm)(x)))


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


@pytest.mark.parametrize("case", ["shape", "eps"])
def test_maps_that_differ_go_one_by_one(uncompiled, case):
    norms = [nn.BatchNorm2d(32), nn.BatchNorm2d(32, eps=0.1 if case == "eps" else 1e-5)]
    xs = [channels_last(2, 32, 4, 4), channels_last(2, 32, 4, 2 if case == "shape" else 4)]
    expected = [F.relu(deepcopy(norm)(x)) for norm, x in zip(norms, xs, strict=True)]
    torch.testing.assert_close(norm_relu(norms, xs), expected)


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

"""One pass for BatchNorm, shortcut and ReLU: the same numbers as the modules one by one."""

from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from torch import nn

from ride_timm.launch import has_compiler
from ride_timm.models import fused_norm
from ride_timm.models.fused_norm import FusedBlock, forward_together, fuse_norm_relu, norm_relu


@pytest.fixture
def uncompiled(monkeypatch):
    """The passes as plain tensor arithmetic: what they compute, without the wait for a compiler."""
    monkeypatch.setattr(fused_norm, "_compiled", lambda one_pass: one_pass)


def channels_last(*shape, dtype=torch.float32, generator=None):
    return torch.randn(*shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)


def judge(dtype, shape, with_shortcut):
    """Outputs, gradients and running statistics of both ways: float64 modules, and the one-pass way in `dtype`."""
    torch.manual_seed(0)
    x, out_grad = 3 * channels_last(*shape) + 5, channels_last(*shape)  # a mean to cancel against
    x, out_grad = x.to(dtype), out_grad.to(dtype)
    shortcut = channels_last(*shape, dtype=dtype) if with_shortcut else None
    norm = nn.BatchNorm2d(shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)

    def results(norm, compute, *inputs):
        inputs = [None if value is None else value.clone().requires_grad_() for value in inputs]
        out = compute(norm, *inputs)
        out.backward(out_grad.to(out.dtype))
        grads = [value.grad for value in (*inputs, norm.weight, norm.bias) if value is not None]
        return [out, *grads, norm.running_mean, norm.running_var, norm.num_batches_tracked]

    def one_by_one(norm, x, shortcut):
        return F.relu(norm(x) if shortcut is None else norm(x) + shortcut)

    wide = None if shortcut is None else shortcut.double()
    expected = results(deepcopy(norm).double(), one_by_one, x.double(), wide)
    assert fused_norm._fits(norm, x, shortcut)
    return expected, results(norm, norm_relu, x, shortcut)


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("shape", [(4, 24, 8, 8), (3, 48, 4, 4), (2, 16, 6, 8), (5, 32, 1, 1), (2, 384, 7, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_same_numbers_as_in_float64(uncompiled, dtype, tolerance, shape, with_shortcut):
    expected, found = judge(dtype, shape, with_shortcut)
    assert found[0].dtype == dtype and found[0].is_contiguous(memory_format=torch.channels_last)
    for wanted, value in zip(expected, found, strict=True):
        scale = wanted.double().abs().max().item()
        torch.testing.assert_close(value.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_passes_give_the_same():
    for with_shortcut in (False, True):
        expected, found = judge(torch.float32, (4, 24, 4, 4), with_shortcut)
        for wanted, value in zip(expected, found, strict=True):
            torch.testing.assert_close(value.double(), wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["eval", "layout", "dtype", "one value"])
def test_what_does_not_fit_goes_one_by_one(uncompiled, case):
    norm, shape = nn.BatchNorm2d(24), (1, 24, 1, 1) if case == "one value" else (4, 24, 4, 4)
    x = channels_last(*shape)
    if case == "eval":
        norm.eval()
    if case == "layout":
        x = x.contiguous(memory_format=torch.contiguous_format)
    if case == "dtype":
        norm, x = norm.double(), x.double()
    assert not fused_norm._fits(norm, x, None)
    if case == "one value":
        with pytest.raises(ValueError, match="more than 1 value"):
            norm_relu(norm, x)
    else:
        torch.testing.assert_close(norm_relu(norm, x), F.relu(deepcopy(norm)(x)))


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


def test_experts_enter_together(uncompiled):
    torch.manual_seed(0)
    model = timm.create_model("ride_resnet32").to(memory_format=torch.channels_last).double()
    alone, together = deepcopy(model), deepcopy(model)
    assert together.fuse_training() and together.together
    x = channels_last(2, 16, 8, 8).double()
    one_by_one = [expert.forward_both(x) for expert in alone.experts]
    for wanted, found in zip(one_by_one, forward_together(together.experts, x), strict=True):
        for a, b in zip(wanted, found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "kwargs", "together"),
    [
        ("ride_resnet32", {}, True),
        ("ride_resnet32", {"num_experts": 1}, False),
        ("test_ride_resnet", {}, False),  # its shortcuts have filters of their own
        ("ride", {"backbone": "test_vit", "img_size": 32}, False),
    ],
)
def test_who_enters_together(name, kwargs, together):
    model = timm.create_model(name, **kwargs)
    blocks = model.fuse_training()
    assert model.together is together and (blocks > 0) == (name != "ride")


def test_only_plain_blocks_are_changed():
    plain, squeezed = BasicBlock(8, 8), BasicBlock(8, 8)
    squeezed.se = nn.Conv2d(8, 8, 1)
    model = nn.Sequential(plain, squeezed, BasicBlock(8, 8, act_layer=nn.SiLU))
    assert fuse_norm_relu(model) == 1 and isinstance(model[0], FusedBlock) and model[1] is squeezed

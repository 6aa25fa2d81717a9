"""Fused BatchNorm, shortcut and ReLU: the same numbers as the modules."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from channels import channels_last
from torch import nn

from ride_timm.hardware import has_compiler
from ride_timm.models.fused import norm as fused_norm
from ride_timm.models.fused.norm import norm_relu


def judge(dtype, shape, with_shortcut, count=1, twice=False):
    """Compare the fused pass in `dtype` with float64 modules.

    Compared are outputs, gradients and running statistics.
    count: feature maps in one call; twice: each output has two uses with different gradients, here a copy each.
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
def test_statistics_lose_little_to_cancellation(shift, first, tolerance):
    """Compiled sums over 1,024 rows, far from zero or with an outlier."""
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
    assert len(compiled) == 2  # statistics and normalisation
    norm_relu([norm], [x[:, :, :1].contiguous(memory_format=torch.channels_last)])
    assert len(compiled) == 4
    assert norm.num_batches_tracked == 3 and not torch.equal(norm.running_mean, torch.zeros(32))


@pytest.mark.parametrize("case", ["eval", "layout", "dtype", "one value", "mean of all batches"])
def test_what_does_not_fit_takes_the_modules(uncompiled, case):
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


@pytest.mark.parametrize("case", ["shape", "eps"])
def test_maps_that_differ_take_the_modules(uncompiled, case):
    norms = [nn.BatchNorm2d(32), nn.BatchNorm2d(32, eps=0.1 if case == "eps" else 1e-5)]
    xs = [channels_last(2, 32, 4, 4), channels_last(2, 32, 4, 2 if case == "shape" else 4)]
    expected = [F.relu(deepcopy(norm)(x)) for norm, x in zip(norms, xs, strict=True)]
    torch.testing.assert_close(norm_relu(norms, xs), expected)

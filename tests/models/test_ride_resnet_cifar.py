"""The option-A shortcut of the CIFAR ResNet-32."""

import pytest
import torch
import torch.nn.functional as F

from ride_timm.models.ride_resnet_cifar import PadShortcut


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_subsampled_and_padded_with_zero_channels(layout):
    x = torch.randn(2, 16, 8, 6).contiguous(memory_format=layout)
    out = PadShortcut(16, 25)(x)
    assert torch.equal(out, F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 5)))


def test_the_gradient_is_channels_last():
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = PadShortcut(16, 24)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(grad[:, :, ::2, ::2], torch.ones(2, 16, 4, 4)) and grad.sum() == 2 * 16 * 16

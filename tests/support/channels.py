"""Random feature maps in channels-last memory format, as in training."""

import torch


def channels_last(*shape, dtype=torch.float32, generator=None):
    return torch.randn(*shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)

"""Small seeded networks, and batches for them."""

import timm
import torch

from ride_timm.models import Ride

SIZES = {"test_ride_resnet": 64, "ride_resnet32": 32, "ride_resnet10": 64}
SMALL = list(SIZES)


def build(name="test_ride_resnet", seed=0, **kwargs) -> Ride:
    torch.manual_seed(seed)
    return timm.create_model(name, **dict(dict(num_classes=11), **kwargs)).eval()


def images(name="test_ride_resnet", B=4, in_chans=3, size=None, seed=1, **kwargs):
    length = size or SIZES[name]
    return torch.randn(B, in_chans, length, length, generator=torch.Generator().manual_seed(seed), **kwargs)

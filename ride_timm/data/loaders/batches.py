"""What all loaders share: a rank's part in an epoch, seeds by purpose, and samples put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ...errors import RunError
from .orders import Order, Shares, check_integer


def torch_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextmanager
def generator_of(*key: int) -> Iterator[None]:
    """torchvision draws from the global CPU generator: lend it this key's stream, then give it back untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(*key))
        yield


class Batches:
    """What all kinds of loader share: the order, this rank's part in it, and the epoch."""

    def __init__(self, order: Order, shares: Shares, seed: int, device: str | torch.device) -> None:
        self.order, self.shares = order, shares
        self.seed = check_integer(seed, "seed", 0)
        self.device = torch.device(device)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Epochs count from 0; the next iteration gives this one."""
        self.epoch = check_integer(epoch, "epoch", 0)

    def __len__(self) -> int:
        """Steps that this rank takes in an epoch."""
        return len(self.shares)


def collate(samples: list) -> tuple[Tensor, Tensor] | RunError:
    failed = next((sample for sample in samples if isinstance(sample, RunError)), None)
    if failed is not None:
        return failed
    images, labels = zip(*samples, strict=True)
    return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.tensor(labels, dtype=torch.int64)

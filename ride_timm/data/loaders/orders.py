"""The images of an epoch: their order, and each rank's slice of every batch.

Everything random is a pure function of (seed, epoch), so resuming at the start of an epoch needs no saved state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from ...errors import InputError

# one random stream per purpose, so that no two purposes use the same draws; the last three are the loaders'
SHUFFLE, CLASS, BUCKET, BATCH, SAMPLE, STRONG = range(6)

SAMPLERS = ("instance", "class_balanced", "square_root", "progressive")


def check_integer(value: int, name: str, low: int) -> int:
    """The value as an int; `InputError` unless it is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise InputError(f"{name} {value!r} is not an integer of at least {low}")
    return int(value)


class Order(Protocol):
    """The images of an epoch in order, a pure function of the epoch.

    `order(epoch)` returns positions, int64 [len(order)].
    """

    def __call__(self, epoch: int) -> np.ndarray: ...

    def __len__(self) -> int: ...


class SequentialOrder:
    """Every image once, in order, in every epoch."""

    def __init__(self, n: int) -> None:
        self.n = check_integer(n, "number of images", 1)

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        return np.arange(self.n, dtype=np.int64)


class ShuffledOrder:
    """Every image once, shuffled anew in every epoch."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = check_integer(n, "number of images", 1)
        self.seed = check_integer(seed, "seed", 0)

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, SHUFFLE, check_integer(epoch, "epoch", 0)]).permutation(self.n)


def class_probabilities(class_counts: ArrayLike, sampler: str, epoch: int = 0, epochs: int = 1) -> np.ndarray:
    """Probability that a sampler draws each class in an epoch, counted from 0.

    class_counts [C], above 0 -> [C], proportional to n_c^q: q = 1 for "instance", 0 for "class_balanced", 1/2 for
    "square_root". "progressive" is (1 - t) * instance + t * class-balanced, with t from 0 in the first epoch to 1 in
    the last, as in the authors' code. Kang et al. 2020, arXiv:1910.09217, section 3, equations 1 and 2.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    if sampler == "progressive":
        t = min(epoch / max(epochs - 1, 1), 1.0)
        return (1 - t) * counts / counts.sum() + t / len(counts)
    weights = counts ** {"instance": 1.0, "class_balanced": 0.0, "square_root": 0.5}[sampler]
    return weights / weights.sum()


class SampledOrder:
    """N draws per epoch: a class by a sampler's probabilities, then the next image of its bucket.

    sampler: see `class_probabilities`; "class_balanced" is stage two of arXiv:2010.01809. epochs: those of the stage,
    which "progressive" depends on. An exhausted bucket is reshuffled, and buckets continue across epochs. How far each
    one got follows from the class draws of earlier epochs, so no state is saved.
    """

    def __init__(self, labels: ArrayLike, seed: int, sampler: str, epochs: int = 1) -> None:
        labels = np.asarray(labels)
        self.sampler = sampler
        self.epochs = check_integer(epochs, "number of epochs", 1)
        self.n = check_integer(len(labels), "number of images", 1)
        self.seed = check_integer(seed, "seed", 0)
        present, self.counts = np.unique(labels, return_counts=True)
        self.classes = present.tolist()
        self.buckets = np.split(np.argsort(labels, kind="stable"), np.cumsum(self.counts)[:-1])
        self._before = [np.zeros(len(self.buckets), dtype=np.int64)]  # draws of each bucket before each epoch

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        draws = self._draw_classes(check_integer(epoch, "epoch", 0))
        for earlier in range(len(self._before) - 1, epoch):
            self._before.append(self._before[-1] + self._count(self._draw_classes(earlier)))
        before = self._before[epoch]
        positions = np.split(np.argsort(draws, kind="stable"), np.cumsum(self._count(draws))[:-1])
        order = np.empty(self.n, dtype=np.int64)
        for k, (bucket, position) in enumerate(zip(self.buckets, positions, strict=True)):
            if len(position):
                order[position] = bucket[self._bucket_sequence(k, int(before[k]), len(position))]
        return order

    def _draw_classes(self, epoch: int) -> np.ndarray:
        """The bucket of each draw of an epoch, [N]."""
        generator = np.random.default_rng([self.seed, CLASS, epoch])
        if self.sampler == "class_balanced":
            return generator.integers(len(self.buckets), size=self.n)
        probabilities = class_probabilities(self.counts, self.sampler, epoch, self.epochs)
        return generator.choice(len(self.buckets), size=self.n, p=probabilities)

    def _count(self, draws: np.ndarray) -> np.ndarray:
        return np.bincount(draws, minlength=len(self.buckets))

    def _bucket_sequence(self, k: int, start: int, length: int) -> np.ndarray:
        """Entries start ... start+length-1 of bucket k's endless sequence of permutations."""
        size = len(self.buckets[k])
        first, last = start // size, (start + length - 1) // size
        # permutation j sorts the random keys j*size ... (j+1)*size-1 of the class' stream, which can start anywhere
        bits = np.random.PCG64([self.seed, BUCKET, self.classes[k]]).advance(first * size)
        keys = np.random.Generator(bits).random((last - first + 1, size))
        permutations = np.argsort(keys, axis=1, kind="stable").reshape(-1)
        return permutations[start - first * size :][:length]


class Slice(NamedTuple):
    """One step: the global batch, and this rank's slice of it.

    The batch is start ... stop-1 of the epoch, the slice low ... high-1.
    """

    step: int
    start: int
    stop: int
    low: int
    high: int


@dataclass(frozen=True)
class RankSlices:
    """An epoch cut into global batches, and those into a slice per rank.

    Slices of a batch differ by at most one image. The last, partial batch is kept. In training, all ranks take the same
    number of steps, so a last batch with fewer images than processes is dropped: a rank without images could not join
    the gradient exchange. In evaluation no image is dropped or repeated; a rank skips a batch in which it has none.
    """

    num_draws: int
    batch_size: int
    train: bool
    rank: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        check_integer(self.batch_size, "batch size", 1)
        check_integer(self.num_processes, "number of processes", 1)
        if check_integer(self.rank, "rank", 0) >= self.num_processes:
            raise InputError(f"rank {self.rank} is not below the number of processes, {self.num_processes}")
        if self.train and min(self.batch_size, self.num_draws) < self.num_processes:
            what = (
                f"a batch of {self.batch_size}"
                if self.batch_size < self.num_processes
                else f"a set of {self.num_draws}"
            )
            raise InputError(
                f"{what} is too small for {self.num_processes} processes: each needs an image in every step"
            )

    @property
    def fewest(self) -> tuple[int, int]:
        """The fewest images of a rank in a full training batch, and in the last."""
        rest = self.num_draws % self.batch_size
        full = self.batch_size // self.num_processes
        return full, rest // self.num_processes if rest >= self.num_processes else full

    def __iter__(self) -> Iterator[Slice]:
        for step, start in enumerate(range(0, self.num_draws, self.batch_size)):
            stop = min(start + self.batch_size, self.num_draws)
            low, high = (start + (stop - start) * r // self.num_processes for r in (self.rank, self.rank + 1))
            if (stop - start >= self.num_processes) if self.train else high > low:
                yield Slice(step, start, stop, low, high)

    def __len__(self) -> int:
        full, rest = divmod(self.num_draws, self.batch_size)
        steps = full + (rest > 0)
        if self.train:
            return steps - (0 < rest < self.num_processes)
        return sum(1 for _ in self)


class EpochKeys:
    """Sampler: (epoch, slice, this rank's images, int64 [b]) of every step.

    It does not refer to its loader: in a reference cycle, the queues of a `DataLoader` would be finalised before its
    workers are stopped, and each would take five seconds to notice.
    """

    def __init__(self, order: Order, slices: RankSlices) -> None:
        self.order, self.slices, self.epoch = order, slices, 0

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        order = self.order(epoch)
        for part in self.slices:
            yield epoch, part, order[part.low : part.high]


def torch_seed(*key: int) -> int:
    """A seed for torch's generators, from a key of integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Batches:
    """Base of all loaders: the slices of this rank, and the epoch."""

    def __init__(self, slices: RankSlices, seed: int, device: str | torch.device) -> None:
        self.slices = slices
        self.seed = check_integer(seed, "seed", 0)
        self.device = torch.device(device)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, of the next iteration."""
        self.epoch = check_integer(epoch, "epoch", 0)

    def __len__(self) -> int:
        """Steps of this rank in an epoch."""
        return len(self.slices)

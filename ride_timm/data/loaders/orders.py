"""Which images an epoch shows, in what order, and which of them each process takes.

Everything random is a pure function of (seed, epoch), so a run resumed at an epoch's start needs no saved state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ...errors import InputError

# one stream of random numbers per purpose, so that no two purposes share draws; the last three are the loader's
SHUFFLE, CLASS, BUCKET, BATCH, SAMPLE, STRONG = range(6)


def check_integer(value: int, name: str, low: int) -> int:
    """The value as an int. Raises `InputError`, naming it, unless it is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise InputError(f"{name} {value!r} is not an integer of at least {low}")
    return int(value)


class Order(Protocol):
    """The images of an epoch: `order(epoch)` gives positions int64 [len(order)], the same for the same epoch."""

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
    """Every image once, in an order of its own for every epoch."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = check_integer(n, "number of images", 1)
        self.seed = check_integer(seed, "seed", 0)

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, SHUFFLE, check_integer(epoch, "epoch", 0)]).permutation(self.n)


class ClassBalancedOrder:
    """N draws an epoch: a class uniformly, then the next image of its shuffled bucket. Stage two of arXiv:2010.01809.

    A bucket that is used up is shuffled anew, and it goes on in the next epoch where it stopped in the last. Where it
    stopped follows from the class draws of the epochs before, so no state is kept.
    """

    def __init__(self, labels: ArrayLike, seed: int) -> None:
        labels = np.asarray(labels)
        self.n = check_integer(len(labels), "number of images", 1)
        self.seed = check_integer(seed, "seed", 0)
        present, counts = np.unique(labels, return_counts=True)
        self.classes = present.tolist()
        self.buckets = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        # epoch, and how many images each bucket has given before it: a shortcut for the next epoch, not a state
        self._reached = 0, np.zeros(len(self.buckets), dtype=np.int64)

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        draws = self._draw_classes(check_integer(epoch, "epoch", 0))
        before = self._drawn_before(epoch)
        places = np.split(np.argsort(draws, kind="stable"), np.cumsum(self._count(draws))[:-1])
        order = np.empty(self.n, dtype=np.int64)
        for k, (bucket, place) in enumerate(zip(self.buckets, places, strict=True)):
            if len(place):
                order[place] = bucket[self._bucket_sequence(k, int(before[k]), len(place))]
        return order

    def _draw_classes(self, epoch: int) -> np.ndarray:
        """Which bucket each draw of the epoch takes from, [N]."""
        return np.random.default_rng([self.seed, CLASS, epoch]).integers(len(self.buckets), size=self.n)

    def _count(self, draws: np.ndarray) -> np.ndarray:
        return np.bincount(draws, minlength=len(self.buckets))

    def _drawn_before(self, epoch: int) -> np.ndarray:
        """How many images each bucket has given before this epoch."""
        reached, total = self._reached if self._reached[0] <= epoch else (0, np.zeros_like(self._reached[1]))
        for earlier in range(reached, epoch):
            total = total + self._count(self._draw_classes(earlier))
        self._reached = epoch, total
        return total

    def _bucket_sequence(self, k: int, start: int, length: int) -> np.ndarray:
        """Entries start … start+length-1 of bucket k's endless sequence of permutations."""
        size = len(self.buckets[k])
        first, last = start // size, (start + length - 1) // size
        # Permutation j sorts the random keys j*size … (j+1)*size-1 of the class' stream, which can be entered anywhere.
        bits = np.random.PCG64([self.seed, BUCKET, self.classes[k]]).advance(first * size)
        keys = np.random.Generator(bits).random((last - first + 1, size))
        permutations = np.argsort(keys, axis=1, kind="stable").reshape(-1)
        return permutations[start - first * size :][:length]


class Share(NamedTuple):
    """One step: the global batch start … stop-1 of the epoch, and low … high-1 of it that this rank takes."""

    step: int
    start: int
    stop: int
    low: int
    high: int


@dataclass(frozen=True)
class Shares:
    """An epoch of `num_draws` cut into global batches, and those into contiguous shares that differ by at most one.

    The last, partial batch is kept. In training, all ranks take the same number of steps, so a last batch with fewer
    samples than processes is dropped: a rank without samples could not join the others' gradient exchange. In
    evaluation nothing is dropped or repeated; a rank just skips a batch that has nothing for it.
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
                f"batch size {self.batch_size}" if self.batch_size < self.num_processes else f"{self.num_draws} images"
            )
            raise InputError(f"{what} cannot serve {self.num_processes} processes: each needs a sample in every step")

    @property
    def fewest(self) -> tuple[int, int]:
        """The fewest samples that a rank takes in a training step of a whole batch, and in the last one."""
        rest = self.num_draws % self.batch_size
        whole = self.batch_size // self.num_processes
        return whole, rest // self.num_processes if rest >= self.num_processes else whole

    def __iter__(self) -> Iterator[Share]:
        for step, start in enumerate(range(0, self.num_draws, self.batch_size)):
            stop = min(start + self.batch_size, self.num_draws)
            low, high = (start + (stop - start) * r // self.num_processes for r in (self.rank, self.rank + 1))
            if (stop - start >= self.num_processes) if self.train else high > low:
                yield Share(step, start, stop, low, high)

    def __len__(self) -> int:
        full, rest = divmod(self.num_draws, self.batch_size)
        steps = full + (rest > 0)
        if self.train:
            return steps - (0 < rest < self.num_processes)
        return sum(1 for _ in self)

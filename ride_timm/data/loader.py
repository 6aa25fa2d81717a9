"""Batches: the order of an epoch, each process' share of it, and the images, decoded once or by workers.

Everything random is a pure function of (seed, epoch, place in the epoch). So a run resumed at an epoch's start needs no
saved sampler state, and neither the number of processes nor the number of workers changes what is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import InputError, RunError
from .sources import ImageSet
from .transforms import BatchAugment, Policy, build_transform, fit, get_policy

# one stream of random numbers per purpose, so that no two purposes share draws
_SHUFFLE, _CLASS, _BUCKET, _BATCH, _SAMPLE = range(5)


def _integer(value: int, name: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise InputError(f"{name} {value!r} is not an integer of at least {low}")
    return int(value)


def _torch_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Order(Protocol):
    """The images of an epoch: `order(epoch)` gives positions int64 [len(order)], the same for the same epoch."""

    def __call__(self, epoch: int) -> np.ndarray: ...

    def __len__(self) -> int: ...


class SequentialOrder:
    """Every image once, in order, in every epoch."""

    def __init__(self, n: int) -> None:
        self.n = _integer(n, "number of images", 1)

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        return np.arange(self.n, dtype=np.int64)


class ShuffledOrder:
    """Every image once, in an order of its own for every epoch."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = _integer(n, "number of images", 1)
        self.seed = _integer(seed, "seed", 0)

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, _SHUFFLE, _integer(epoch, "epoch", 0)]).permutation(self.n)


class ClassBalancedOrder:
    """N draws an epoch: a class uniformly, then the next image of its shuffled bucket. Stage two of arXiv:2010.01809.

    A bucket that is used up is shuffled anew, and it goes on in the next epoch where it stopped in the last. Where it
    stopped follows from the class draws of the epochs before, so no state is kept.
    """

    def __init__(self, labels: ArrayLike, seed: int) -> None:
        labels = np.asarray(labels)
        self.n = _integer(len(labels), "number of images", 1)
        self.seed = _integer(seed, "seed", 0)
        present, counts = np.unique(labels, return_counts=True)
        self.classes = present.tolist()
        self.buckets = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        # epoch, and how many images each bucket has given before it: a shortcut for the next epoch, not a state
        self._reached = 0, np.zeros(len(self.buckets), dtype=np.int64)

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int) -> np.ndarray:
        draws = self._draw_classes(_integer(epoch, "epoch", 0))
        before = self._drawn_before(epoch)
        places = np.split(np.argsort(draws, kind="stable"), np.cumsum(self._count(draws))[:-1])
        order = np.empty(self.n, dtype=np.int64)
        for k, (bucket, place) in enumerate(zip(self.buckets, places, strict=True)):
            if len(place):
                order[place] = bucket[self._bucket_sequence(k, int(before[k]), len(place))]
        return order

    def _draw_classes(self, epoch: int) -> np.ndarray:
        """Which bucket each draw of the epoch takes from, [N]."""
        return np.random.default_rng([self.seed, _CLASS, epoch]).integers(len(self.buckets), size=self.n)

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
        bits = np.random.PCG64([self.seed, _BUCKET, self.classes[k]]).advance(first * size)
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
        _integer(self.batch_size, "batch size", 1)
        _integer(self.num_processes, "number of processes", 1)
        if _integer(self.rank, "rank", 0) >= self.num_processes:
            raise InputError(f"rank {self.rank} is not below the number of processes, {self.num_processes}")
        if self.train and min(self.batch_size, self.num_draws) < self.num_processes:
            what = (
                f"batch size {self.batch_size}" if self.batch_size < self.num_processes else f"{self.num_draws} images"
            )
            raise InputError(f"{what} cannot serve {self.num_processes} processes: each needs a sample in every step")

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


class _Batches:
    """What both kinds of loader share: the order, this rank's part in it, and the epoch."""

    def __init__(self, order: Order, shares: Shares, seed: int, device: str | torch.device) -> None:
        self.order, self.shares = order, shares
        self.seed = _integer(seed, "seed", 0)
        self.device = torch.device(device)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Epochs count from 0; the next iteration gives this one."""
        self.epoch = _integer(epoch, "epoch", 0)

    def __len__(self) -> int:
        """Steps that this rank takes in an epoch."""
        return len(self.shares)


def decode(image_set: ImageSet, size: int | None = None) -> Tensor:
    """All images of a set, uint8 [N, H, W, 3]; fitted to size x size if given (shorter side, then centre crop).

    Raises `RunError`, naming the row, for an image that cannot be read;
    `InputError` if sizes differ and none is given.
    """
    resize = fit(size) if size else None
    pixels = None
    for i in range(len(image_set)):
        image = image_set[i][0]
        array = np.asarray(resize(image) if resize else image)
        if pixels is None:
            pixels = np.empty((len(image_set), *array.shape), dtype=np.uint8)
        if array.shape != pixels.shape[1:]:
            (h, w), (first_h, first_w) = array.shape[:2], pixels.shape[1:3]
            raise InputError(
                f"the image in row {image_set.rows[i]} of split {image_set.split!r} is {w}x{h} pixels, the first one "
                f"{first_w}x{first_h}; give a size to fit them to"
            )
        pixels[i] = array
    if pixels is None:
        raise InputError(f"split {image_set.split!r} has zero images")
    return torch.from_numpy(pixels)


class TensorBatches(_Batches):
    """Batches of a set of small images that is held decoded, on `device`, and augmented a batch at a time.

    Yields (images float32 [b, 3, S, S] channels last, labels int64 [b]) on `device`. The random choices of a step are
    drawn for the global batch and then cut, so they do not depend on the number of processes.

    pixels: uint8 [N, S, S, 3]; labels: [N].
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: ArrayLike,
        policy: str | Policy,
        *,
        order: Order,
        shares: Shares,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(order, shares, seed, device)
        labels = np.asarray(labels, dtype=np.int64)
        if (
            pixels.dtype != torch.uint8
            or pixels.ndim != 4
            or pixels.shape[1] != pixels.shape[2]
            or pixels.shape[3] != 3
        ):
            raise InputError(f"pixels must be uint8 [N, S, S, 3], not {pixels.dtype} {list(pixels.shape)}")
        if len(labels) != len(pixels):
            raise InputError(f"{len(pixels)} images have {len(labels)} labels")
        self.pixels = pixels.to(self.device)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.augment = BatchAugment(policy, pixels.shape[1], self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        order = torch.from_numpy(self.order(epoch)).to(self.device)
        for step, start, stop, low, high in self.shares:
            positions = order[low:high]
            images = self.pixels.index_select(0, positions)
            if self.shares.train:
                generator = torch.Generator().manual_seed(_torch_seed(self.seed, _BATCH, epoch, step))
                draws = self.augment.draw(stop - start, generator).part(low - start, high - start)
                images = self.augment(images, draws)
            else:
                images = self.augment.normalize(images)
            yield images, self.labels.index_select(0, positions)


class _Samples:
    """Map-style data set for the workers: (epoch, position in the epoch, index) -> (image [3, H, W], label)."""

    def __init__(self, image_set: ImageSet, policy: Policy, train: bool, input_size: int | None, seed: int) -> None:
        self.image_set, self.train, self.seed = image_set, train, seed
        self.transform = build_transform(policy, train, input_size)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int] | RunError:
        epoch, position, index = key
        try:
            image, label = self.image_set[index]
        except RunError as error:
            return error  # raised in a worker, it would arrive buried in a traceback
        if not self.train:
            return self.transform(image), label
        # torchvision draws from the global CPU generator: lend it this sample's stream, then give it back untouched
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_torch_seed(self.seed, _SAMPLE, epoch, position))
            return self.transform(image), label


def _collate(samples: list) -> tuple[Tensor, Tensor] | RunError:
    failed = next((sample for sample in samples if isinstance(sample, RunError)), None)
    if failed is not None:
        return failed
    images, labels = zip(*samples, strict=True)
    return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.tensor(labels, dtype=torch.int64)


class WorkerBatches(_Batches):
    """Batches of large images, decoded and augmented one by one, by worker processes if there are any.

    Yields as `TensorBatches` does. A sample's random choices depend on the seed, the epoch and its position in the
    epoch only; the global generators are neither read nor moved.
    """

    def __init__(
        self,
        image_set: ImageSet,
        policy: str | Policy,
        *,
        order: Order,
        shares: Shares,
        seed: int,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        input_size: int | None = None,
    ) -> None:
        super().__init__(order, shares, seed, device)
        num_workers = _integer(num_workers, "number of workers", 0)
        self.keys = _Keys(order, shares)
        self.loader = DataLoader(
            _Samples(image_set, get_policy(policy), shares.train, input_size, self.seed),
            batch_sampler=self.keys,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers else None,
            generator=torch.Generator(),  # its own: DataLoader draws a base seed, even if nobody uses it
        )

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.keys.epoch = self.epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            if isinstance(batch, RunError):
                raise batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Keys:
    """Batch sampler: this rank's (epoch, position, index) of every step. The keys bring the epoch to the workers.

    It does not know its `WorkerBatches`: in a reference cycle, the queues would be finalised before the workers are
    told to stop, and each would take five seconds to notice.
    """

    def __init__(self, order: Order, shares: Shares) -> None:
        self.order, self.shares, self.epoch = order, shares, 0

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch = self.epoch
        order = self.order(epoch)
        for share in self.shares:
            yield [(epoch, position, int(order[position])) for position in range(share.low, share.high)]


def make_loader(
    image_set: ImageSet,
    policy: str | Policy,
    *,
    train: bool,
    batch_size: int,
    seed: int,
    order: str | None = None,
    rank: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    input_size: int | None = None,
) -> TensorBatches | WorkerBatches:
    """The loader of a set: held in memory where the policy is one of small images, else read by workers.

    train: shuffle and augment; else every image once, in order, test transform.
    batch_size: over all processes together.
    order: None, or "balanced" to draw classes uniformly (training only).
    input_size: side of the input; the policy's own by default. Small images of another size are resized as decoded.

    Raises `InputError` for arguments out of range, before an image is read.
    """
    policy = get_policy(policy)
    size = policy.input_size(input_size)
    _integer(num_workers, "number of workers", 0)
    if len(image_set) == 0:
        raise InputError(f"split {image_set.split!r} has zero images")
    if order not in (None, "balanced") or (order and not train):
        raise InputError(f"unknown order {order!r}; choose None, or 'balanced' for training")
    if order == "balanced":
        chosen = ClassBalancedOrder(image_set.labels, seed)
    else:
        chosen = ShuffledOrder(len(image_set), seed) if train else SequentialOrder(len(image_set))
    shares = Shares(len(image_set), batch_size, train, rank, num_processes)
    common = {"order": chosen, "shares": shares, "seed": seed, "device": device}
    if policy.in_memory:
        return TensorBatches(decode(image_set, size), image_set.labels, policy, **common)
    return WorkerBatches(image_set, policy, num_workers=num_workers, input_size=size, **common)

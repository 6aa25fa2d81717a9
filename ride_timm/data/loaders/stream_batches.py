"""Batches of a streamed set, on every process the same number of steps."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ...errors import RunError, first_line
from ..augment.transforms import Policy, build_augment, build_crop, get_policy
from ..image_set import open_stored
from .batches import Batches, collate, generator_of
from .orders import SAMPLE, SequentialOrder, Shares, check_integer
from .streaming import Part, StreamedSet


class _StreamSamples(IterableDataset):
    """A part of a stream, decoded and augmented where it is read: (key, (image [3, H, W], label)), see `_Samples`.

    Random choices depend on the seed, the epoch and the image alone, whichever process and worker meets it.
    """

    def __init__(
        self, part: Part, policy: Policy, train: bool, input_size: int | None, seed: int, reduced_decode: bool
    ) -> None:
        self.part, self.train, self.seed = part, train, seed
        self.crop = build_crop(policy, train, input_size, reduced_decode)
        self.augment = build_augment(policy, train, input_size)
        self.epoch = 0  # the workers are started anew for every pass, so they see it

    def __iter__(self) -> Iterator[tuple[str, tuple[Tensor, int] | RunError]]:
        for stored, key, label in self.part:
            with generator_of(self.seed, SAMPLE, self.epoch, zlib.crc32(key.encode())):
                yield key, self._sample(stored, key, label)

    def _sample(self, stored: dict, key: str, label: int) -> tuple[Tensor, int] | RunError:
        try:
            with open_stored(stored) as opened:
                return self.augment(self.crop(opened)), label
        except Exception as error:  # decoders raise whatever they like
            failed = RunError(f"the image {key} of the stream cannot be read ({first_line(error)})")
            failed.__cause__ = error
            return failed


def _collate(samples: list) -> tuple[tuple[str, ...], tuple[Tensor, Tensor] | RunError]:
    keys, images = zip(*samples, strict=True)
    return keys, collate(images)


class StreamBatches(Batches):
    """Batches of images met in passing; what order and completeness can be relied on is said in `streaming`.

    Yields as `TensorBatches` does. In training, every process takes the same number of steps, that of an epoch of the
    whole list: one whose part is smaller begins it anew, one whose part is larger leaves its last images out. In
    evaluation each process gives its part once, in batches of varying size.
    """

    def __init__(
        self,
        images: StreamedSet,
        policy: str | Policy,
        *,
        shares: Shares,
        seed: int,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        input_size: int | None = None,
        reduced_decode: bool = True,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(SequentialOrder(len(images)), shares, seed, device)
        self.images = images
        part = images.part(shares.rank, shares.num_processes, shuffle_buffer if shares.train else 0, self.seed)
        self.samples = _StreamSamples(part, get_policy(policy), shares.train, input_size, self.seed, reduced_decode)
        # more workers than shards would stand idle, and `datasets` would say so
        self.loader = DataLoader(
            self.samples,
            batch_size=max(1, shares.batch_size // shares.num_processes),
            num_workers=min(check_integer(num_workers, "number of workers", 0), part.rows.num_shards),
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.samples.epoch = self.epoch
        batches = self._passes() if self.shares.train else self._once()
        for images, labels in batches:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _pass(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.samples.part.set_pass(number)
        met: set[str] = set()
        for keys, batch in self.loader:
            if isinstance(batch, RunError):
                try:
                    raise batch
                finally:  # frame and error would hold each other, and workers found by the garbage collector stop late
                    del batch
            for key in keys:
                if key in met:  # here, not in a worker: each reads shards of its own
                    raise RunError(
                        f"two rows of split {self.images.split!r} have the name of one listed image, {key}, and a "
                        "stream cannot tell which is meant: leave --streaming out, which compares folders as well, or "
                        "list paths that tell them apart"
                    )
                met.add(key)
            yield batch

    def _once(self) -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        for images, labels in self._pass(0):
            seen += len(labels)
            yield images, labels
        if self.shares.num_processes == 1 and seen != len(self.images):
            raise RunError(f"the stream gave {seen} of the {len(self.images)} listed images of {self.images.split!r}")

    def _passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As many batches as this rank has shares, of their sizes, from one pass and, where it ends early, further."""
        wanted, images, labels = iter(self.shares), [], []
        share = next(wanted)
        for again in count():
            empty = True
            # further passes are numbered beyond all epochs: their order is none that an epoch has
            batches = self._pass(self.epoch + again * 1_000_000)
            for more_images, more_labels in batches:
                empty = False
                images.append(more_images)
                labels.append(more_labels)
                held = sum(map(len, labels))
                while held >= (size := share.high - share.low):
                    joined = torch.cat(images), torch.cat(labels)
                    yield joined[0][:size].contiguous(memory_format=torch.channels_last), joined[1][:size]
                    images, labels = [joined[0][size:]], [joined[1][size:]]
                    held -= size
                    share = next(wanted, None)
                    if share is None:
                        if self.shares.num_processes == 1 and not again:
                            next(batches, None)  # a pass has as many images as the list, unless a name comes twice
                        return
            if empty:
                raise RunError(
                    f"this process' part of split {self.images.split!r} holds none of the listed images: use fewer "
                    "processes"
                )

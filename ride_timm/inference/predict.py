"""Predictions of image files, one row for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RunError
from ..evaluation.evaluate import Predict
from ..models import Ride
from .image_files import ImageFiles

Row = dict[str, Any]


class FeatureTap:
    """Keeps the pooled features of a model's last forward pass, the inputs of its classifiers.

    experts: indices of those that run. Copies of the model, such as one with folded BatchNorm, are tapped as well.
    """

    def __init__(self, model: Ride, experts: Sequence[int]) -> None:
        self.experts = experts
        kept: dict[int, Tensor] = {}
        self._kept = kept

        def keep(index: int) -> Any:
            def hook(module: Any, inputs: tuple[Tensor]) -> None:
                kept[index] = inputs[0]

            return hook  # a function, which deepcopy does not copy

        for index in experts:
            model.experts[index].fc.register_forward_pre_hook(keep(index))

    def features(self) -> Tensor:
        """[B, E·D], expert after expert."""
        return torch.cat([self._kept[index].float() for index in self.experts], 1)


class Batch(NamedTuple):
    """Predictions of a batch of files: for each file its error or None, and of the readable ones the rest.

    logits [b, C], used [b] if routed, features [b, E·D] with a tap, on the CPU; None where no file is readable.
    """

    errors: list[str | None]
    logits: Tensor | None = None
    used: Tensor | None = None
    features: Tensor | None = None


@torch.inference_mode()
def predict_batches(
    files: ImageFiles,
    predict: Predict,
    batch_size: int,
    workers: int,
    device: torch.device,
    tap: FeatureTap | None = None,
) -> Iterator[Batch]:
    """Predictions of the files, in order, batch by batch."""
    for images, errors in files.batches(batch_size, workers, device.type == "cuda"):
        if images is None:
            yield Batch(errors)
            continue
        logits, used = predict(images.to(device, non_blocking=True, memory_format=torch.channels_last))
        logits = (logits if logits.ndim == 2 else logits.mean(1)).float().cpu()  # 3: of each expert
        yield Batch(errors, logits, None if used is None else used.cpu(), None if tap is None else tap.features().cpu())


def predicted_rows(
    batches: Iterable[Batch], paths: Sequence[str], names: Sequence[str], top_k: int, shift: Tensor | float = 0.0
) -> Iterator[Row]:
    """Rows of the files, in order, as they are predicted.

    A row holds "image", its path; "label", "index" and "probability" of the most probable class; "top", the same of the
    `top_k` most probable; "experts_used" if routed; "features" [E·D] with a tap. Of a file that cannot be read it holds
    "image" and "error". shift [C] is added to the logits.
    """
    start = 0
    for batch in batches:
        rows = iter([] if batch.logits is None else _rows(batch, batch.logits + shift, names, top_k))
        for path, error in zip(paths[start : start + len(batch.errors)], batch.errors, strict=True):
            image = os.fsencode(path).decode("utf-8", "replace")  # file names are bytes, rows are text
            yield dict(image=image, **(next(rows) if error is None else dict(error=error)))
        start += len(batch.errors)


def _rows(batch: Batch, logits: Tensor, names: Sequence[str], top_k: int) -> list[Row]:
    values, indices = logits.softmax(1).topk(min(top_k, logits.shape[1]))
    tops = [
        [dict(label=names[i], index=i, probability=round(p, 6)) for p, i in zip(*pair, strict=True)]
        for pair in zip(values.tolist(), indices.tolist(), strict=True)
    ]
    rows: list[Row] = [dict(top[0], top=top) for top in tops]
    for key, column in dict(experts_used=batch.used, features=batch.features).items():
        if column is not None:
            rows = [dict(row, **{key: value}) for row, value in zip(rows, column.tolist(), strict=True)]
    return rows


class Counted:
    """Rows that pass through, with a count of those read."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows, self.total, self.failed = rows, 0, 0
        self.first: Row | None = None

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            self.total += 1
            if "error" in row:
                self.failed += 1
                self.first = self.first or row
            yield row

    def report(self) -> None:
        """Print how many images could not be read; RunError if none could."""
        if self.first is None:
            return
        first = f"{self.first['image']} ({self.first['error']})"
        unread = f"{self.failed} of {self.total} images cannot be read, the first: {first}"
        if self.failed == self.total:
            raise RunError(unread)
        print(f"notice: {unread}", file=sys.stderr)

"""Predictions of image files, one row for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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


def predict_images(
    files: ImageFiles,
    predict: Predict,
    names: Sequence[str],
    top_k: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    tap: FeatureTap | None = None,
) -> Iterator[Row]:
    """Rows of the files, in order, as they are predicted.

    A row holds "image", its path; "label", "index" and "probability" of the most probable class; "top", the same of the
    `top_k` most probable; "experts_used" if routed; "features" [E·D] with a tap. Of a file that cannot be read it holds
    "image" and "error".
    """
    start = 0
    for images, errors in files.batches(batch_size, workers, device.type == "cuda"):
        rows = iter([] if images is None else _rows(images.to(device, non_blocking=True), predict, names, top_k, tap))
        for path, error in zip(files.paths[start : start + len(errors)], errors, strict=True):
            image = os.fsencode(path).decode("utf-8", "replace")  # file names are bytes, rows are text
            yield dict(image=image, **(next(rows) if error is None else dict(error=error)))
        start += len(errors)


@torch.inference_mode()
def _rows(images: Tensor, predict: Predict, names: Sequence[str], top_k: int, tap: FeatureTap | None) -> list[Row]:
    logits, used = predict(images)
    if logits.ndim == 3:  # of each expert
        logits = logits.mean(1)
    values, indices = logits.float().softmax(1).topk(min(top_k, logits.shape[1]))
    tops = [
        [dict(label=names[i], index=i, probability=round(p, 6)) for p, i in zip(*pair, strict=True)]
        for pair in zip(values.tolist(), indices.tolist(), strict=True)
    ]
    rows: list[Row] = [dict(top[0], top=top) for top in tops]
    columns = dict(experts_used=used, features=None if tap is None else tap.features())
    for key, column in columns.items():
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

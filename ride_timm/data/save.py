"""Save the selected images of a data set, to read them without the rest."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Resampling

from ..errors import InputError, RunError, first_line
from .augment.images import Planned, upright_size
from .augment.reduced_decode import decode_reduced
from .hub import SELECTION
from .image_set import ImageSet, LongTailData
from .load import load_longtail, profile_of
from .longtail import IMB_FACTOR

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image


def save_longtail(
    output: str | Path,
    dataset: str,
    data_dir: str | None = None,
    *,
    max_side: int | None = None,
    workers: int = 0,
    **settings: Any,
) -> LongTailData:
    """Save the selected images of a data set, undecoded, to a new folder.

    The data set is loaded by `load_longtail`, with these settings. The training, test and, if there is one, validation
    split keep their images, order, labels, class names and split names. The folder appears once it is complete. Returns
    the data as loaded.

    max_side: shrink images with a longer side to this many pixels there, as `shrunk` does, by `workers` processes.

    Raises `InputError` for an existing folder, for streaming, for a `max_side` below 1, and as `load_longtail` does;
    `RunError` if writing fails, or an image to be shrunk cannot be read.
    """
    from datasets import DatasetDict

    output = Path(output).expanduser()
    if settings.get("streaming"):
        raise InputError("a stream does not hold the images to save: leave --streaming out")
    if output.exists():
        raise InputError(f"folder {str(output)!r} exists: pass a new one as --output")
    if max_side is not None and max_side < 1:
        raise InputError(f"max_side={max_side}: expected 1 or more pixels")
    data = load_longtail(dataset, data_dir, **settings | dict(use_val=None))
    sets = [data.train, data.test, *([] if data.val is None else [data.val])]
    column = settings.get("label_column") or "label"
    splits = {name: _rows(part, data, column) for name, part in zip(data.split_names, sets, strict=True)}
    how = (settings.get("imb_type"), settings.get("imb_factor", IMB_FACTOR), settings.get("seed", 0))
    selection = dict(dataset=dataset, imb_type=profile_of(dataset, *how), imb_factor=how[1], seed=how[2])
    selection |= {} if max_side is None else dict(max_side=max_side)
    selection |= {} if data.test_held_out is None else dict(test_held_out=data.test_held_out)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        if max_side is not None:
            for name, part in zip(splits, sets, strict=True):
                splits[name] = _shrink_rows(splits[name], part, max_side, workers, folder / f"{name}.arrow")
        DatasetDict(splits).save_to_disk(folder / "data")
        (folder / "data" / SELECTION).write_text(json.dumps(selection, indent=2) + "\n", encoding="utf-8")
        os.rename(folder / "data", output)
    except RunError:  # names the image
        raise
    except Exception as error:  # a missing image, a full disk: `datasets` and pyarrow have no common error
        raise RunError(f"{str(output)!r} could not be written: {first_line(error)}") from error
    finally:
        splits.clear()  # Windows deletes no file that is mapped
        gc.collect()
        shutil.rmtree(folder, ignore_errors=True)
    return data


def _rows(images: ImageSet, data: LongTailData, label_column: str) -> Dataset:
    """The selected rows of a split with their labels, undecoded and not copied yet."""
    from datasets import ClassLabel

    labels = np.zeros(len(images.images), dtype=np.int64)
    labels[images.rows] = images.labels  # before the selection, since a column added after it copies all images
    twice = np.flatnonzero(labels[images.rows] != images.labels)
    if len(twice):
        raise InputError(f"row {images.rows[twice[0]]} of split {images.split!r} is listed with two labels")
    rows = images.images.add_column(label_column, labels, feature=ClassLabel(names=list(data.class_names)))
    return rows.select(images.rows)


def shrunk(image: Image, max_side: int) -> bytes | None:
    """An opened image as a JPEG of at most `max_side` pixels a side, upright; None if it is no larger as it is.

    Bicubic with antialiasing, quality 95 without chroma subsampling. Raises what Pillow raises.
    """
    if max(upright_size(image)) <= max_side:
        return None

    def plan(width: int, height: int) -> Planned:
        scale = max_side / max(width, height)
        size = max(1, round(scale * width)), max(1, round(scale * height))
        return Planned((0, 0, width, height), size, Resampling.BICUBIC)

    written = BytesIO()
    decode_reduced(image, plan).save(written, "JPEG", quality=95, subsampling=0)
    return written.getvalue()


def _shrink_rows(rows: Dataset, images: ImageSet, max_side: int, workers: int, cache: Path) -> Dataset:
    """The rows of a set with its larger images shrunk, held in a cache file."""
    from datasets import Features, Image

    column = images.image_column
    undecoded = rows.cast_column(column, Image(decode=False))

    def shrink(row: dict[str, Any], i: int) -> dict[str, Any]:
        data, _ = images.read(i, partial(shrunk, max_side=max_side))
        return {} if data is None else {column: {"bytes": data, "path": row[column]["path"]}}

    smaller = undecoded.map(
        shrink,
        with_indices=True,
        num_proc=workers or None,
        cache_file_name=str(cache),
        writer_batch_size=100,
        features=Features(undecoded.features),
        desc=f"shrinking {images.split}",
    )
    return smaller.cast_column(column, rows.features[column])

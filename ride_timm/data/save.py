"""Save the selected images of a data set, to read them without the rest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, RunError, first_line
from .hub import SELECTION
from .image_set import ImageSet, LongTailData
from .load import load_longtail, profile_of
from .longtail import IMB_FACTOR

if TYPE_CHECKING:
    from datasets import Dataset


def save_longtail(output: str | Path, dataset: str, data_dir: str | None = None, **settings: Any) -> LongTailData:
    """Save the selected images of a data set, undecoded, to a new folder.

    The data set is loaded by `load_longtail`, with these settings. The training, test and, if there is one, validation
    split keep their images, order, labels, class names and split names. The folder appears once it is complete. Returns
    the data as loaded.

    Raises `InputError` for an existing folder, for streaming, and as `load_longtail` does; `RunError` if writing fails.
    """
    from datasets import DatasetDict

    output = Path(output).expanduser()
    if settings.get("streaming"):
        raise InputError("a stream does not hold the images to save: leave --streaming out")
    if output.exists():
        raise InputError(f"folder {str(output)!r} exists: pass a new one as --output")
    data = load_longtail(dataset, data_dir, **settings | dict(use_val=None))
    sets = [data.train, data.test, *([] if data.val is None else [data.val])]
    column = settings.get("label_column") or "label"
    splits = {name: _rows(part, data, column) for name, part in zip(data.split_names, sets, strict=True)}
    how = (settings.get("imb_type"), settings.get("imb_factor", IMB_FACTOR), settings.get("seed", 0))
    selection = dict(dataset=dataset, imb_type=profile_of(dataset, *how), imb_factor=how[1], seed=how[2])
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        DatasetDict(splits).save_to_disk(partial / "data")
        (partial / "data" / SELECTION).write_text(json.dumps(selection, indent=2) + "\n", encoding="utf-8")
        os.rename(partial / "data", output)
    except Exception as error:  # a missing image, a full disk: `datasets` and pyarrow have no common error
        raise RunError(f"{str(output)!r} could not be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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

"""The size of a data set's first training image, known without loading the set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from ..files import expanded
from .augment.images import open_image, upright_size
from .columns import choose_image_column, first_rows, image_rows
from .datasets import EMBEDDED, KNOWN, lists_of
from .folders import files_below, is_image, split_folders
from .hub import holds_rows, is_hub_id, is_saved_to_disk, local_path, path_roots, read_hub, read_local, read_splits
from .image_set import open_stored
from .lists import find_lists, image_root, read_list
from .split_roles import training_split

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def first_image_size(
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    image_column: str | None = None,
    train_split: str = "train",
    annotations: str | Path | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
) -> tuple[int, int] | None:
    """(width, height) of the first training image; None if it cannot be known cheaply.

    Arguments as for `load_longtail`. No image is decoded: of a folder of images the first file is opened, of rows
    (parquet, `save_to_disk`, a Hub data set) the first. The size is that of the upright image. None, too, if the data
    set cannot be read; `load_longtail` says why.
    """
    try:
        paths, hub = (expanded(data_dir), expanded(annotations)), (dataset_config, dataset_revision)
        image = _first_image(str(dataset), *paths, image_column, train_split, *hub)
        if image is None:
            return None
        with image:
            return upright_size(image)
    except Exception:  # file systems, decoders and `datasets` have no common error
        return None


def _first_image(
    dataset: str,
    data_dir: Path | None,
    annotations: Path | None,
    image_column: str | None,
    train_split: str,
    config: str | None,
    revision: str | None,
) -> Image | None:
    from datasets import Image as ImageFeature

    path = local_path(dataset, data_dir)
    if path is not None and not holds_rows(path):
        if annotations is not None or lists_of(dataset) is not None:
            train = read_list(find_lists(dataset, data_dir, annotations)["train"])
            return open_image(image_root(dataset, path, train) / train.files[0])
        folders = split_folders(path).get(train_split, [path])
        file = next((file for folder in folders for file in files_below(folder) if is_image(file)), None)
        if file is not None:
            return open_image(file)
    splits = _rows(dataset, path, config, revision)
    rows = first_rows(splits[training_split(splits, train_split)])
    column = choose_image_column(rows, image_column)
    images = image_rows(rows, column, path_roots(path)).cast_column(column, ImageFeature(decode=False))
    return open_stored(next(row[column] for row in images if row[column] is not None))


def _rows(
    dataset: str, path: Path | None, config: str | None, revision: str | None
) -> Mapping[str, Dataset | IterableDataset]:
    """Splits whose first row is read without the others."""
    import datasets

    if path is not None:
        return read_local(path, streaming=not is_saved_to_disk(path), config=config)
    if dataset in EMBEDDED:
        return read_splits(dataset, None)
    hub_id = KNOWN[dataset].hub_id if dataset in KNOWN else dataset
    # offline, `datasets` reads what it has prepared, but streams nothing
    return (
        {}
        if hub_id is None or not is_hub_id(hub_id)
        else read_hub(hub_id, dataset, not datasets.config.HF_HUB_OFFLINE, config, revision)
    )

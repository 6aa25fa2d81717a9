"""Load a long-tailed data set: embedded, from the Hub, or from a local folder.

Loading reads labels only; images are decoded on access. `datasets` is heavy and imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import expanded
from .columns import check_unseen, choose_image_column, image_rows, sets_of_columns
from .datasets import EMBEDDED, KNOWN, default_profile, lists_of
from .hub import (
    holds_rows,
    is_hub_id,
    is_saved,
    local_path,
    path_roots,
    read_hub,
    read_local,
    read_selection,
    read_splits,
)
from .image_set import ImageSet, LongTailData
from .lists import (
    check_classes,
    check_first_images,
    find_lists,
    hub_split,
    image_root,
    listed_files,
    read_list,
    rows_of,
)
from .longtail import IMB_FACTOR, check_imbalance, longtail_indices
from .split_roles import split_roles
from .streaming import streamed_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from .lists import AnnotationList

TEST_FRACTION = 0.2  # of each class, held out where there is no test split


def load_longtail(
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    imb_type: str | None = None,
    imb_factor: float = IMB_FACTOR,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    annotations: str | Path | None = None,
    use_val: bool | None = False,
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
) -> LongTailData:
    """Read a data set and make its training split long-tailed, from the labels alone.

    dataset: a name of `datasets.KNOWN`, a Hub id "owner/name", or a local path: a folder that `datasets.load_dataset`
        reads (parquet, images by class in train/ and test/, ...) or one of `save_to_disk`.
    data_dir: read the data set from this local path instead, whatever its name; a folder of `save_longtail` holds its
        selected images.
    imb_type, imb_factor, seed: see `longtail_indices`; by default "exp" for the balanced data sets of the table, and
        "none", the training split as it is, for all others.
    image_column, label_column: default the first image column (`img` and `image` preferred), and the first of
        fine_label, label, labels.
    test_split: default the split named test, else validation, in any of their forms and in any case (Test, eval, valid,
        dev, ...). Where there is none, 20 % of each training class are held out with `seed` before the selection.
    annotations: folder of annotation lists, from which images and classes are read. The images are files under
        `data_dir`, or the rows of that name in its parquet files or in the Hub data set.
    use_val: read the validation split as well, as `val`; None: if there is one.
    dataset_config, dataset_revision: configuration, and branch, tag or commit, of a Hub data set.
    streaming, shuffle_buffer: with lists, and rows that have file names: stream the rows, see `streaming`.

    Raises `InputError` if the data set is not found, or for unusable splits, columns or labels.
    """
    dataset, data_dir, annotations = str(dataset), expanded(data_dir), expanded(annotations)
    profile = profile_of(dataset, imb_type, imb_factor, seed)
    if dataset in EMBEDDED and (data_dir or annotations) is not None:
        given = str(data_dir or annotations)
        raise InputError(f"data set {dataset!r} is embedded in the package: name the data set that {given!r} holds")
    from_lists = annotations is not None or lists_of(dataset) is not None
    if data_dir is not None and is_saved(data_dir):
        wanted = dict(dataset=dataset, imb_type=profile, imb_factor=imb_factor, seed=seed)
        _check_selection(data_dir, annotations, wanted)
        profile, from_lists = "none", False  # selected already
    if from_lists:
        paths = find_lists(dataset, data_dir, annotations)
        roles = split_roles(paths, train_split, test_split, use_val)
        if "test" not in roles and lists_of(dataset) is not None:
            raise InputError(f"there is no test list of {dataset} next to {paths['train']}")
        make_set = partial(streamed_rows, shuffle_buffer=shuffle_buffer) if streaming else _matched_rows
        lists = {name: read_list(paths[name]) for name in roles.values()}
        hub = dict(config=dataset_config, revision=dataset_revision)
        sets, class_names = _from_lists(dataset, data_dir, lists, image_column, streaming, make_set, hub)
    elif streaming:
        raise InputError(
            "streaming needs annotation lists of the images to expect: pass --annotations, or leave it out"
        )
    else:
        splits = read_splits(dataset, data_dir, dataset_config, dataset_revision)
        roles = split_roles(splits, train_split, test_split, use_val)
        chosen = {name: splits[name] for name in roles.values()}
        folders = path_roots(local_path(dataset, data_dir))
        sets, class_names = sets_of_columns(chosen, image_column, label_column, folders)
    by_role = dict(zip(roles, sets, strict=True))
    if "test" in roles:
        train, test, place = by_role["train"], by_role["test"], local_path(dataset, data_dir)
        held_out = read_selection(place)["test_held_out"] if place and is_saved(place) else None
    else:
        train, test = _hold_out_test(by_role["train"], seed)
        held_out = f"{TEST_FRACTION:g} of {roles['train']}, held out with seed {seed}"
    rows = longtail_indices(train.labels, profile, imb_factor, seed, len(class_names))
    names = tuple(({"train": "train", "test": "test"} | roles).values())
    return LongTailData(train.select(rows), test, class_names, dataset, by_role.get("val"), names, len(train), held_out)


def profile_of(dataset: str, imb_type: str | None, imb_factor: float, seed: int) -> str:
    """The long-tailed profile; `InputError` for settings the set cannot have."""
    profile = imb_type or default_profile(dataset)
    check_imbalance(profile, imb_factor, seed)
    known = KNOWN.get(dataset)
    if known is not None and not known.balanced:
        if (profile, imb_factor, seed) == ("exp", known.imb_factor, 0):
            return "none"  # stated, though it is how the data set was made
        if profile != "none" or imb_factor != IMB_FACTOR:
            raise InputError(
                f"data set {dataset!r} is long-tailed already: leave imb_type, imb_factor and the split's seed out, or "
                "choose another data set"
            )
    if profile == "none" and imb_factor != IMB_FACTOR:
        raise InputError(f"imb_factor={imb_factor:g} needs a long-tailed profile: add --imb-type exp or step")
    return profile


def _check_selection(data_dir: Path, annotations: Path | None, wanted: dict[str, Any]) -> None:
    """Raise `InputError` if a saved folder does not hold the wanted selection."""
    if annotations is not None:
        raise InputError(f"folder {str(data_dir)!r} holds selected images: leave --annotations out")
    saved = read_selection(data_dir)
    free: tuple[str, ...] = ("imb_factor", "seed") if wanted["imb_type"] == "none" else ()
    if saved["test_held_out"]:  # by the seed
        free = free[:1]
    differing = [key for key, value in wanted.items() if key not in free and saved[key] != value]
    if differing:
        held, asked = (", ".join(f"{key}={values[key]}" for key in differing) for values in (saved, wanted))
        raise InputError(
            f"folder {str(data_dir)!r} was saved with {held}, not {asked}: save the other selection to another folder"
        )


def _hold_out_test(train: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    if len(train) == 0 or np.bincount(train.labels).max() * TEST_FRACTION < 0.5:
        raise InputError(
            f"the data set has no test split, and no class has the 3 images it takes to hold one out of split "
            f"{train.split!r}: add a split test"
        )
    return hold_out(train, TEST_FRACTION, seed)


def _from_lists(
    dataset: str,
    data_dir: Path | None,
    lists: dict[str, AnnotationList],
    image_column: str | None,
    streaming: bool,
    make_set: Callable[..., Any],
    hub: dict[str, str | None],
) -> tuple[list[Any], tuple[str, ...]]:
    """Complete sets of these lists, training first, and its class names."""
    train, *others = lists.values()
    published = lists_of(dataset)
    num_classes = check_classes(train, published.num_classes if published else None)
    for other in others:
        check_unseen(other.labels, num_classes, f"annotation list {other.path}")
    class_names = train.class_names(num_classes)
    if data_dir is not None and not data_dir.exists():
        raise InputError(f"data set folder {str(data_dir)!r} does not exist")
    if data_dir is not None and not holds_rows(data_dir):
        if streaming:
            raise InputError("streaming is for rows of a Hub data set, and files are read one by one: leave it out")
        return [
            _listed_files(part, image_root(dataset, data_dir, part), name) for name, part in lists.items()
        ], class_names
    if data_dir is not None:
        splits = read_local(data_dir, streaming)
    else:
        hub_id = KNOWN[dataset].hub_id if dataset in KNOWN else dataset
        if hub_id is None:
            raise InputError(f"the images of {dataset} are not on the Hub: pass their root as --data-dir")
        if not is_hub_id(hub_id):
            raise InputError(f"no images of {dataset!r}: pass their root as --data-dir, or name a Hub id")
        splits = read_hub(hub_id, dataset, streaming, **hub)
    sets = []
    for name, part in lists.items():
        split_name = hub_split(part, name, list(splits))
        split = splits[split_name]
        column = choose_image_column(split, image_column)
        images = split if streaming else image_rows(split, column, path_roots(data_dir))
        sets.append(make_set(part, images, column, split_name))
    return sets, class_names


def _listed_files(annotations: AnnotationList, root: Path, split: str) -> ImageSet:
    check_first_images(annotations, root)
    rows = np.arange(len(annotations))
    images = listed_files(annotations, root)
    return ImageSet(images, rows, annotations.labels, "image", split, annotations.path)


def _matched_rows(annotations: AnnotationList, images: Dataset, image_column: str, split_name: str) -> ImageSet:
    rows = rows_of(annotations, images, image_column, split_name)
    return ImageSet(images, rows, annotations.labels, image_column, split_name)


def hold_out(image_set: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out a seeded, stratified fraction of a training set: (the rest, held out).

    The fraction of each class is rounded, but at least one of its images stays. Both parts keep the original order.
    Raises `InputError` for a fraction outside (0, 0.5] or one too small to hold out an image.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 0.5:
        raise InputError(f"held-out fraction {fraction!r} is outside (0, 0.5]")
    held = np.zeros(len(image_set), dtype=bool)
    rng = np.random.default_rng([_seed(seed), 0x401D])
    _, counts = np.unique(image_set.labels, return_counts=True)
    for members in np.split(np.argsort(image_set.labels, kind="stable"), np.cumsum(counts)[:-1]):
        rng.shuffle(members)
        held[members[: min(math.floor(len(members) * fraction + 0.5), len(members) - 1)]] = True
    if not held.any():
        raise InputError(f"held-out fraction {fraction:g} of {len(image_set)} images holds out none; raise it")
    return image_set.select(np.flatnonzero(~held)), image_set.select(np.flatnonzero(held))


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"seed {seed!r} is not a non-negative integer")
    return int(seed)

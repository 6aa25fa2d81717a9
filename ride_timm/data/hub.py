"""Read the splits of a data set from the package, a folder or the Hub."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line, listed, quiet
from .datasets import EMBEDDED, KNOWN
from .folders import check_zips, files_below, scan_classes, split_folders, split_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from datasets.data_files import DataFilesList

SELECTION = "selection.json"  # of a folder of `save_longtail`: the data set, and how its images were selected
_ROWS = ("*.parquet", "data/*.parquet")
# files of rows by extension: their builder of `datasets`, and its options; classes may be called NA, None or null
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", dict(keep_default_na=False, na_values=[""])),
}


def read_splits(
    dataset: str, data_dir: str | Path | None, config: str | None = None, revision: str | None = None
) -> dict[str, Dataset]:
    """The splits by name.

    They come from `data_dir`, the package, a local path or the Hub, the first that applies. config, revision: of a Hub
    data set; a local folder may have configurations, too.
    """
    path = local_path(dataset, data_dir)
    hub_id = KNOWN[dataset].hub_id if dataset in KNOWN else dataset
    if path is not None:
        if revision is not None:
            raise InputError(f"dataset_revision={revision!r}: {str(path)!r} is local, not a Hub data set; leave it out")
        return read_local(path, config=config)
    if dataset in EMBEDDED:
        if config or revision:
            raise InputError(f"data set {dataset!r} is embedded: leave dataset_config and dataset_revision out")
        return _read_embedded(dataset)
    if hub_id is not None and is_hub_id(hub_id):
        return read_hub(hub_id, dataset, config=config, revision=revision)
    raise InputError(
        f"unknown data set {dataset!r}: neither one of {', '.join(KNOWN)}, nor a Hub id owner/name, nor an existing "
        "folder"
    )


def local_path(dataset: str, data_dir: str | Path | None) -> Path | None:
    """The local path that a data set is read from; None for the package and the Hub."""
    path = Path(dataset if data_dir is None else data_dir).expanduser()
    with _file_errors(path):
        return path if data_dir is not None or (dataset and dataset not in KNOWN and path.exists()) else None


def path_roots(path: Path | None) -> tuple[Path, ...]:
    """The folders where relative paths in the rows of a local path may start."""
    if path is None:
        return ()
    return (path.parent,) if path.is_file() else (path, path / "data")


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """`InputError` for files and folders that the file system does not give, such as those without permission."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {first_line(error)}") from error


def _read_embedded(dataset: str) -> dict[str, Dataset]:
    from datasets import Dataset
    from pyarrow import parquet

    def read(split: str) -> Dataset:
        # into memory: a set this small needs no copy in the cache of `datasets`
        with as_file(files(__package__) / dataset / f"{split}.parquet") as path:
            return Dataset(parquet.read_table(path))

    return {split: read(split) for split in ("train", "test")}


def read_hub(
    hub_id: str, name: str, streaming: bool = False, config: str | None = None, revision: str | None = None
) -> dict[str, Dataset | IterableDataset]:
    """The splits of a Hub data set; `InputError` if they cannot be read."""
    import datasets

    how = {"streaming": streaming or None, "name": config, "revision": revision}
    with _quiet(datasets):
        try:
            splits = datasets.load_dataset(hub_id, **{key: value for key, value in how.items() if value is not None})
        except Exception as error:  # no network, no such repository, gated, no images: all have the same way out
            _check_config(error, f"data set {name!r}", config)
            _check_cache(error)
            folder = f" (there is no folder {hub_id!r} here either)" if hub_id == name else ""
            at = f" at revision {revision!r}" if revision else ""
            raise InputError(
                f"cannot read data set {name!r} from https://huggingface.co/datasets/{hub_id}{at}{folder}: "
                f"{first_line(error)}; check the name and the network, or give a local copy with --data-dir"
            ) from error
    return dict(splits)


def _check_config(error: Exception, what: str, config: str | None) -> None:
    """Raise `InputError` for a data set of several configurations, or of a loading script."""
    text = str(error)
    if "Config name is missing" in text or ("BuilderConfig" in text and "not found" in text):
        names = re.findall(r"'([^']*)'", text[text.find("vailable") :].partition("]")[0])
        problem = "has several configurations" if config is None else f"has no configuration {config!r}"
        raise InputError(f"{what} {problem}: pass --dataset-config, one of {listed(names)}") from error
    if "scripts are no longer supported" in text:
        raise InputError(
            f"{what} is read by a script, {text.rpartition(' ')[2]}, which `datasets` does not run: pass "
            "--dataset-revision refs/convert/parquet for the Hub's copy in parquet, or a local copy as --data-dir"
        ) from error


def _check_cache(error: BaseException | None) -> None:
    """Raise `InputError` where `datasets` cannot write its cache."""
    from datasets import config

    cache = Path(config.HF_DATASETS_CACHE)
    while error is not None:
        if isinstance(error, OSError):
            file = Path(str(error.filename)) if error.filename else None
            at_cache = file is not None and (cache.is_relative_to(file) or file.is_relative_to(cache))
            if at_cache or error.errno == errno.ENOSPC:
                raise InputError(
                    f"the cache of `datasets`, {cache}, cannot be written ({first_line(error)}): make room, or name "
                    "another folder by the environment variable HF_HOME"
                ) from error
        error = error.__cause__


def read_local(path: Path, streaming: bool = False, config: str | None = None) -> dict[str, Dataset | IterableDataset]:
    """The splits of a folder, or of a parquet or CSV file; `InputError` if unreadable."""
    import datasets

    with _file_errors(path):
        if not path.exists():
            raise InputError(f"data set folder {str(path)!r} does not exist")
        if path.is_file() and path.suffix.lower() not in _BUILDERS:
            raise InputError(f"{str(path)!r} is a file; give the folder that holds the data set, a .parquet or a .csv")
        saved, by_card = is_saved_to_disk(path), _has_card(path)
        if config is not None and not by_card:
            raise InputError(f"dataset_config={config!r}: {str(path)!r} has no card with configurations; leave it out")
        if not (by_card or holds_rows(path)):
            if not streaming and (scanned := scan_classes(path)) is not None:
                return dict(scanned)
            check_zips(path)
    if saved and streaming:
        raise InputError(f"{str(path)!r} was written by save_to_disk, which needs no streaming: leave --streaming out")
    how = dict(streaming=True) if streaming else {}
    with _quiet(datasets):
        try:
            if saved:
                splits = datasets.load_from_disk(str(path))
            elif path.is_file():
                builder, options = _BUILDERS[path.suffix.lower()]
                splits = datasets.load_dataset(builder, data_files=_data_files({"train": [path]}), **how, **options)
            elif by_card:
                splits = datasets.load_dataset(str(path), **how, **(dict(name=config) if config else {}))
            else:
                files, options = _files_by_split(path), _csv_options(path)
                data_files = {} if files is None else dict(data_files=_data_files(files))
                splits = datasets.load_dataset(str(path), **data_files, **how, **options)
        except Exception as error:  # empty or mixed folders, broken parquet: `datasets` has no common error
            _check_config(error, f"folder {str(path)!r}", config)
            _check_cache(error)
            raise InputError(
                f"cannot read a data set from {str(path)!r}: {first_line(error)}; expected parquet files, "
                "folders of images by class under train/ and test/, or a folder of save_to_disk, and no empty split"
            ) from error
    return dict(splits) if isinstance(splits, dict) else {"train": splits}


def _csv_options(path: Path) -> dict[str, Any]:
    """Options of the CSV builder for a folder that `datasets` reads by it; none for other folders."""
    kinds = set()
    for file in files_below(path):
        kinds.add(os.path.splitext(file)[1].lower())
        if not kinds <= {".csv", ".md", ".txt"}:  # at the first image, without a walk through all of them
            return {}
    return _BUILDERS[".csv"][1] if ".csv" in kinds else {}


def _files_by_split(path: Path) -> dict[str, list[Path]] | None:
    """The files of a folder by split, if its folders name the splits or its path reads as a glob; else None.

    By default, `datasets` looks for split names in all folders, and adds the test images of a class named "train" or
    "train station" to the training set; and it takes the path for a pattern.
    """
    rows = holds_rows(path)
    if not rows and (folders := split_folders(path)):
        return {split: [Path(f) for folder in some for f in files_below(folder)] for split, some in folders.items()}
    if escape(str(path.resolve())) == str(path.resolve()):
        return None
    files = [Path(file) for file in files_below(path)]
    if rows:
        files = [file for pattern in _ROWS for file in sorted(path.glob(pattern))]
    named: dict[str, list[Path]] = {}
    for file in files:
        shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", file.stem)
        if split := split_of(file.stem) or (shard and shard[1]):
            named.setdefault(split, []).append(file)
    return named or {"train": files}


def _data_files(files: dict[str, list[Path]]) -> dict[str, DataFilesList]:
    """`data_files` of these paths, taken literally; `datasets` prepares them anew when one was modified."""
    from datasets.data_files import DataFilesList

    found = {split: [path.resolve() for path in some] for split, some in files.items()}
    return {
        split: DataFilesList(list(map(str, some)), [(str(path.stat().st_mtime),) for path in some])
        for split, some in found.items()
    }


def _has_card(path: Path) -> bool:
    """True if a card in the folder defines its configurations."""
    for card in (path / "README.md", path / ".huggingface.yaml"):
        try:
            if card.is_file() and re.search(r"^configs:", card.read_text("utf-8"), re.M):
                return True
        except UnicodeDecodeError as error:
            raise InputError(f"{str(card)!r} is not UTF-8 ({first_line(error)}): save it as UTF-8") from error
    return False


@contextmanager
def _quiet(datasets) -> Iterator[None]:
    """Suppress progress bars, retry warnings and logged errors; the final error says it once."""
    from datasets.utils import are_progress_bars_disabled

    bars = not are_progress_bars_disabled()
    if bars:
        datasets.disable_progress_bars()
    try:
        with quiet("huggingface_hub"), quiet("datasets"):
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def holds_rows(path: Path) -> bool:
    """True if a local path holds rows (parquet, or `save_to_disk`), not image files."""
    if path.is_file() or is_saved_to_disk(path):
        return True
    return any(next(path.glob(pattern), None) for pattern in _ROWS)


def is_saved_to_disk(path: Path) -> bool:
    """True for a folder of `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def is_saved(path: str | Path | None) -> bool:
    """True for a folder of `save_longtail`."""
    if path is None:
        return False
    with _file_errors(Path(path)):
        return (Path(path).expanduser() / SELECTION).is_file()


def read_selection(path: Path) -> dict[str, Any]:
    """The selection that a folder of `save_longtail` holds; `InputError` for a damaged file.

    -> {"dataset", "imb_type", "imb_factor", "seed", "test_held_out"}, the last as in `LongTailData`
    """
    try:
        selection = json.loads((path / SELECTION).read_text(encoding="utf-8"))
        found = {key: selection[key] for key in ("dataset", "imb_type", "imb_factor", "seed")}
        return found | dict(test_held_out=selection.get("test_held_out"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path / SELECTION} is not as `datasets save` wrote it ({first_line(error)}): save the data set again"
        ) from error


def is_hub_id(name: str) -> bool:
    """True for owner/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None

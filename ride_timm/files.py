"""Atomic writes, and numbers by class from a file."""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from .errors import InputError, RunError


def sync(path: Path) -> None:
    """Force a file to the disk; OSError where it does not take it."""
    with path.open("r+b") as written:  # Windows syncs no file that is open for reading only
        os.fsync(written.fileno())


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """A partial file beside `path` to fill, renamed to `path` where the block ends without an error.

    keep: the name that an older file of this name gets at the same moment.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a killed process
        partial.touch()
        mode = partial.stat().st_mode  # what umask and the folder give to new files
        yield partial
        partial.chmod(mode)  # safetensors replaces the file by one that only its owner can read
        sync(partial)
        if keep is not None and path.is_file():
            os.replace(path, keep)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Let `write` fill a partial file beside `path`, then rename it to `path`, and the old file to `keep` if given.

    RunError where writing fails; the old file is then unchanged.
    """
    try:
        with replacing(path, keep) as partial:
            write(partial)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors wrap a full disk
        message = f"{path} could not be written, is the disk full? An older file of this name is unchanged. ({error})"
        raise RunError(message) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder to fill, renamed to `folder`, new or empty, where the block ends without an error.

    RunError where writing fails; nothing is then left there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            partial = Path(scratch) / folder.name
            partial.mkdir()
            yield partial
            if folder.is_dir():  # Windows replaces no folder
                folder.rmdir()
            os.replace(partial, folder)
    except OSError as error:
        raise RunError(f"{folder} could not be written ({error}); nothing was left there.") from error


def expanded(path: str | Path | None) -> Path | None:
    """A path with ~ replaced by the home folder; None stays None."""
    return None if path is None else Path(path).expanduser()


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


def write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; None is an empty cell."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(heading)
            table.writerows(rows)

    write_atomically(path, write)


def read_class_values(path: str | Path, class_names: Sequence[str]) -> list[float]:
    """One number for each class from a file, [C] in class order.

    JSON (.json): {name: number}, or a list in class order. Any other file is text: lines `name,number` (or with a tab)
    in any order, below a heading or not, or one number a line in class order. InputError, naming line or class, for a
    class unknown, missing or repeated, and for anything but a finite number of at least 0.
    """
    entries = _json_entries(path) if str(path).endswith(".json") else _text_entries(path, class_names)
    named = [name for _, name, _ in entries if name is not None]
    if not named and len(entries) != len(class_names):
        raise InputError(f"{path} has {len(entries)} numbers, expected one for each of {len(class_names)} classes.")
    if named and (len(named) < len(entries) or len(set(class_names)) < len(class_names)):
        reason = "some lines name no class" if len(named) < len(entries) else "class names of the data are not unique"
        raise InputError(f"{path}: {reason}; give one number a line, in class order.")
    values: dict[str, float] = {}
    for i, (where, name, value) in enumerate(entries):
        key = str(i) if name is None else name
        if named and name not in class_names:
            raise InputError(f"{where}: the data have no class {name!r}; classes are {_some(class_names)}.")
        if key in values:
            raise InputError(f"{where}: class {name!r} is there twice.")
        values[key] = _at_least_zero(value, where)
    missing = [name for name in class_names if name not in values] if named else []
    if missing:
        raise InputError(f"{path}: no number for {_some(missing)} ({len(missing)} of {len(class_names)} classes).")
    return [values[name] for name in class_names] if named else list(values.values())


_Entries = list[tuple[str, str | None, Any]]  # where it stands, name of the class if given, number


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _json_entries(path: str | Path) -> _Entries:
    try:
        content = json.loads(_read(path), object_pairs_hook=list)  # repeated names stay
    except (ValueError, RecursionError) as error:  # ValueError: of JSON, and for numbers of thousands of digits
        raise InputError(f"{path} is not JSON ({error}).") from error
    if isinstance(content, list) and all(isinstance(item, tuple) for item in content):
        return [(f"{path}, class {name!r}", name, value) for name, value in content]
    if isinstance(content, list):
        return [(f"{path}, number {i}", None, value) for i, value in enumerate(content, 1)]
    raise InputError(f"{path}: expected {{name: number}} or a list of numbers.")


def _text_entries(path: str | Path, class_names: Sequence[str]) -> _Entries:
    text = _read(path)
    rows = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ",")
    entries: _Entries = []
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                name = ",".join(row[:-1]).strip() if len(row) > 1 else None  # names may hold commas
                entries.append((f"{path}, line {rows.line_num}", name, row[-1].strip()))
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}.") from error
    if entries and entries[0][1] is not None and entries[0][1] not in class_names and not _is_number(entries[0][2]):
        return entries[1:]  # a heading
    return entries


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _at_least_zero(value: Any, where: str) -> float:
    if not _is_number(value) or not math.isfinite(float(value)) or float(value) < 0:
        raise InputError(f"{where}: {value!r} is not a finite number of at least 0.")
    return float(value)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + ", …" * (len(names) > 5)

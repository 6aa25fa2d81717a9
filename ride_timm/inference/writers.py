"""Tables of predictions as text, JSON, JSON lines, CSV or Parquet, written row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from ..files import replacing
from .predict import Row

_ROW_GROUP = 1000  # rows of a Parquet file that are held in memory


@dataclass(frozen=True)
class Columns:
    """Columns of the rows of `predicted_rows`: `top_k` classes, experts used, features [E·D]."""

    top_k: int
    routed: bool = False
    features: bool = False


def check_output(path: Path, features: bool) -> None:
    """InputError for a file that cannot be written, or whose format has no column of features."""
    if path.suffix.lower() not in WRITERS:
        raise InputError(f"output={path}: expected a file that ends in {', '.join(WRITERS)}.")
    try:
        if not path.parent.is_dir():
            raise InputError(f"output={path}: no folder {path.parent}.")
        if path.is_dir():
            raise InputError(f"output={path} is a folder: name a file.")
    except OSError as error:  # a name that is too long
        raise InputError(f"output={path} cannot be written ({error.strerror}).") from error
    if features and path.suffix.lower() == ".csv":
        raise InputError(f"output={path}: features are columns of .jsonl and .parquet files.")


def write_rows(rows: Iterable[Row], path: Path, columns: Columns) -> None:
    """Write a table in the format of its suffix; the file appears when it is complete.

    RunError where it cannot be written.
    """
    try:
        with replacing(path) as partial:
            WRITERS[path.suffix.lower()](rows, partial, columns)
    except OSError as error:
        raise RunError(f"{path} could not be written; an older file of this name is unchanged. ({error})") from error


def print_rows(rows: Iterable[Row], num_experts: int) -> None:
    """Print a line per image: its classes with their probabilities, and how many experts it used."""
    for row in rows:
        if "error" in row:
            print(f"{row['image']}: cannot be read ({row['error']})")
            continue
        classes = ", ".join(f"{choice['label']} {100 * choice['probability']:.1f} %" for choice in row["top"])
        used = f"  ({row['experts_used']} of {num_experts} experts)" if "experts_used" in row else ""
        print(f"{row['image']}: {classes}{used}")


def print_json_rows(rows: Iterable[Row]) -> None:
    """Print one JSON list."""
    before = "[\n"
    for row in rows:
        print(before + json.dumps(row, indent=2), end="")
        before = ",\n"
    print("\n]")


def _write_csv(rows: Iterable[Row], path: Path, columns: Columns) -> None:
    """One line an image: label, index, probability, then label_2, index_2, …"""
    names = [""] + [f"_{place}" for place in range(2, columns.top_k + 1)]
    header = ["image", *(f"{key}{name}" for name in names for key in ("label", "index", "probability"))]
    header += ["experts_used"] * columns.routed + ["error"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in rows:
            choices = zip(names, row.get("top", ()), strict=False)
            table.writerow(row | {f"{key}{name}": value for name, top in choices for key, value in top.items()})


def _write_json_lines(rows: Iterable[Row], path: Path, columns: Columns) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(rows: Iterable[Row], path: Path, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    choice: dict[str, Any] = dict(label=pa.string(), index=pa.int32(), probability=pa.float32())
    schema = dict(image=pa.string(), **choice, top=pa.list_(pa.struct(choice)))
    schema |= dict(experts_used=pa.int32()) if columns.routed else {}
    schema |= dict(features=pa.list_(pa.float32())) if columns.features else {}
    remaining: Iterator[Row] = iter(rows)
    with pq.ParquetWriter(path, pa.schema(schema | dict(error=pa.string()))) as table:
        while group := list(islice(remaining, _ROW_GROUP)):
            table.write_table(pa.Table.from_pylist(group, table.schema))


WRITERS: dict[str, Callable[[Iterable[Row], Path, Columns], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}

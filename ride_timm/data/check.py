"""Check a published data set against its lists, without decoding an image."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, listed
from .columns import choose_image_column, image_rows
from .datasets import SplitFacts, lists_of
from .hub import holds_rows, path_roots, read_local
from .lists import AnnotationList, find_lists, hub_split, image_root, read_list, rows_of


def check_installation(dataset: str, data_dir: Path | None, annotations: Path | None) -> dict[str, Any]:
    """Compare lists with the published totals, and images with the lists.

    -> {"name", "root", "splits": {split: {"list", "lines", "classes", "largest", "smallest", "class_counts", "missing":
    [{"line", "path"}, ...]}}, "problems": [one sentence each]}. Without `data_dir` the lists alone are checked. Raises
    `InputError` if there are no lists, or one cannot be read.
    """
    published = lists_of(dataset)
    assert published is not None
    if data_dir is not None and not data_dir.exists():
        raise InputError(f"data set folder {str(data_dir)!r} does not exist")
    paths = find_lists(dataset, data_dir, annotations)
    lists = {split: read_list(path) for split, path in paths.items()}
    found: dict[str, Any] = dict(name=dataset, root=None, splits={}, problems=[])
    rows = read_local(data_dir) if data_dir is not None and holds_rows(data_dir) else None
    for split, facts in published.splits.items():
        if split not in lists:
            folder = next(iter(paths.values())).parent
            found["problems"].append(f"{split}: there is no list {published.name(split)} in {folder}")
            continue
        part = lists[split]
        counts = np.bincount(part.labels, minlength=published.num_classes)
        found["problems"] += _differences(split, part, counts, facts, published.num_classes)
        missing: list[dict[str, Any]] = []
        if rows is not None:
            found["root"] = str(data_dir)
            found["problems"] += _missing_rows(split, part, rows, path_roots(data_dir))
        elif data_dir is not None:
            root = image_root(dataset, data_dir, part)
            found["root"] = str(root)
            missing = missing_files(part, root)
            found["problems"] += _missing_by_class(split, part, missing, root)
        present = counts[counts > 0]
        facts_found = dict(classes=len(present), largest=int(present.max()), smallest=int(present.min()))
        found["splits"][split] = dict(
            list=str(part.path), lines=len(part), **facts_found, class_counts=counts.tolist(), missing=missing
        )
    found["problems"] += _shared(lists)
    return found


def _differences(
    split: str, part: AnnotationList, counts: np.ndarray, facts: SplitFacts, num_classes: int
) -> list[str]:
    """Differences between a list and the published one."""
    problems = []
    if len(part) != facts.images:
        difference = len(part) - facts.images
        how = f"{abs(difference):,} too {'many' if difference > 0 else 'few'}"
        problems.append(f"{split}: {part.path} has {len(part):,} lines, expected {facts.images:,} ({how})")
    if len(counts) > num_classes:
        line = int(np.argmax(part.labels >= num_classes)) + 1
        problems.append(f"{split}: line {line} of {part.path} has a label outside 0 … {num_classes - 1}")
    absent = np.flatnonzero(counts[:num_classes] == 0)
    if len(absent):
        problems.append(f"{split}: {len(absent)} of {num_classes} classes have no line: {listed(absent.tolist())}")
    outside = np.flatnonzero((counts > 0) & ((counts > facts.largest) | (counts < facts.smallest)))
    if len(outside):
        expected = f"{facts.smallest} to {facts.largest}" if facts.smallest < facts.largest else f"{facts.largest}"
        those = listed(f"class {c} has {counts[c]}" for c in outside.tolist())
        problems.append(f"{split}: {len(outside)} classes have other counts than {expected}: {those}")
    elif counts.max() != facts.largest or counts[counts > 0].min() != facts.smallest:
        here, expected = f"{counts.max()} and {counts[counts > 0].min()}", f"{facts.largest} and {facts.smallest}"
        problems.append(f"{split}: the largest and the smallest class have {here} lines, expected {expected}")
    first: dict[str, int] = {}
    repeated = [(i, file) for i, file in enumerate(part.files) if first.setdefault(file, i) != i]
    if repeated:
        i, file = repeated[0]
        problems.append(
            f"{split}: {len(repeated)} lines repeat an image, the first is line {i + 1}, "
            f"{file} (line {first[file] + 1})"
        )
    return problems


def missing_files(part: AnnotationList, root: Path) -> list[dict[str, Any]]:
    """Listed images that are missing or empty, {"line", "path"} each.

    Each folder is read once, which is far faster on a network drive than a query per file.
    """
    by_folder: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for i, file in enumerate(part.files):
        folder, _, name = file.rpartition("/")
        by_folder[folder].setdefault(name, []).append(i)
    absent: list[int] = []
    for folder, names in by_folder.items():
        wanted = dict(names)
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name in wanted and entry.is_file() and entry.stat().st_size:
                        del wanted[entry.name]
        except (FileNotFoundError, NotADirectoryError):
            pass
        absent += [i for lines in wanted.values() for i in lines]
    return [dict(line=i + 1, path=str(root / part.files[i])) for i in sorted(absent)]


def _missing_by_class(split: str, part: AnnotationList, missing: list[dict[str, Any]], root: Path) -> list[str]:
    if not missing:
        return []
    if len(missing) == len(part):
        return [f"{split}: none of the {len(part):,} images is under {root}, such as {part.files[0]}"]
    labels = part.labels[[row["line"] - 1 for row in missing]]
    counts, all_counts = np.bincount(labels), np.bincount(part.labels)
    names = part.class_names(len(all_counts)) if all_counts.all() else tuple(map(str, range(len(all_counts))))
    those = listed(f"{names[c]} {counts[c]} of {all_counts[c]}" for c in np.flatnonzero(counts).tolist())
    first = f"line {missing[0]['line']}, {missing[0]['path']}"
    return [
        f"{split}: {len(missing):,} of {len(part):,} images are missing or empty, the first is that of {first}; "
        f"by class: {those}"
    ]


def _missing_rows(split: str, part: AnnotationList, rows: dict[str, Any], roots: tuple[Path, ...]) -> list[str]:
    try:
        name = hub_split(part, split, list(rows))
        column = choose_image_column(rows[name])
        rows_of(part, image_rows(rows[name], column, roots), column, name)
    except InputError as error:
        return [f"{split}: {error}"]
    return []


def _shared(lists: dict[str, AnnotationList]) -> list[str]:
    """Images in two lists: test images must not be trained on."""
    problems, splits = [], list(lists)
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            common = set(lists[one].files) & set(lists[other].files)
            if common:
                problems.append(f"{one} and {other} have {len(common):,} images in common, such as {min(common)}")
    return problems


def format_installation(found: dict[str, Any], num_missing: int = 10) -> str:
    """Format findings: a line per list, the problems, the first missing images."""
    lines = [f"{found['name']}: images under {found['root'] or '– (no --data-dir: lists alone)'}"]
    for split, part in found["splits"].items():
        counts = f"{part['largest']} to {part['smallest']} a class"
        there = f", {part['lines'] - len(part['missing']):,} images there" if found["root"] else ""
        lines.append(f"  {split:<5} {part['lines']:>7,} lines, {part['classes']:>5,} classes, {counts}{there}")
    lines += [f"problem: {problem}" for problem in found["problems"]]
    for split, part in found["splits"].items():
        lines += [f"missing: {split}, line {row['line']}: {row['path']}" for row in part["missing"][:num_missing]]
        if len(part["missing"]) > num_missing:
            lines.append(f"missing: {split}, … {len(part['missing']) - num_missing:,} more (--all)")
    return "\n".join(lines)

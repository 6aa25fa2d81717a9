"""Time to build splits: long-tailed selection by label, published lists, and a folder of images by class.

The lists are synthetic, of the published length and format (`path label` per line), unless `--annotations` names a
folder that holds the real ones. A build reads the training and test lists, checks the classes and the first image of
each class, and creates the image sets; importing `datasets` is not timed. The folder holds empty files in the classes
of iNaturalist 2018.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import datasets  # noqa: F401  (not timed)
import numpy as np
from record import alternate, parse, parser, record, show, summary

from ride_timm.data.datasets import KNOWN, Lists
from ride_timm.data.lists import read_list
from ride_timm.data.load import load_longtail
from ride_timm.data.longtail import longtail_indices

SIZES = {"CIFAR-100": (50_000, 100), "ImageNet-LT": (115_846, 1000), "iNaturalist 2018": (437_513, 8142)}
LISTS = {known.title: name for name, known in KNOWN.items() if known.lists}


def seconds_to_select(labels: np.ndarray) -> float:
    started = time.perf_counter()
    longtail_indices(labels, "exp", 0.1)
    return time.perf_counter() - started


def seconds_to_build(name: str, root: Path, lists: Path) -> float:
    started = time.perf_counter()
    data = load_longtail(name, root, annotations=lists)
    seconds = time.perf_counter() - started
    assert len(data.train) == KNOWN[name].lists.splits["train"].images
    return seconds


def seconds_to_scan(root: Path, num_files: int) -> float:
    started = time.perf_counter()
    data = load_longtail(str(root))
    seconds = time.perf_counter() - started
    assert len(data.train) + len(data.test) == num_files
    return seconds


def make_folder(root: Path, num_files: int) -> None:
    """Create empty files by class, as many in each class as the number allows."""
    num_classes = KNOWN["inat18"].lists.num_classes
    folders = [root / f"{c:05d}_Plantae" for c in range(num_classes)]
    for folder in folders:
        folder.mkdir(parents=True)
    for i in range(num_files):
        (folders[i % num_classes] / f"{i:032x}.jpg").touch()


def make_list(path: Path, published: Lists, split: str, rng: np.random.Generator) -> None:
    """Write a synthetic list: published length and names, every class, long-tailed."""
    facts, num_classes = published.splits[split], published.num_classes
    weights = np.geomspace(100, 1, num_classes) if facts.largest > facts.smallest else np.ones(num_classes)
    drawn = rng.choice(num_classes, facts.images - num_classes, p=weights / weights.sum())
    labels = np.sort(np.concatenate([np.arange(num_classes), drawn])).tolist()
    if published.prefix == "iNaturalist18":
        rng.shuffle(labels)
        names = (f"train_val2018/Plantae/{c}/{rng.bytes(16).hex()}.jpg {c}" for c in labels)
    else:
        names = (f"{split}/n{c:08d}/n{c:08d}_{i}.JPEG {c}" for i, c in enumerate(labels))
    path.write_text("\n".join(names) + "\n", encoding="utf-8")


def prepare(name: str, root: Path, real: Path | None) -> Path:
    """Folder of lists, synthetic unless all are real; creates empty first images."""
    published, rng = KNOWN[name].lists, np.random.default_rng(0)
    splits = ["train", "test" if "test" in published.splits else "val"]
    if real is not None and all((real / published.name(split)).is_file() for split in splits):
        lists = real
    else:
        lists = root
        for split in splits:
            make_list(root / published.name(split), published, split, rng)
    for split in splits:
        part = read_list(lists / published.name(split))
        for i in np.unique(part.labels, return_index=True)[1]:
            path = root / part.files[i]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return lists


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--annotations", type=Path, help="folder of the real lists; missing ones are synthetic")
    flags.add_argument("--files", type=int, default=SIZES["iNaturalist 2018"][0], help="images in the folder by class")
    args = parse(flags, argv)
    rng = np.random.default_rng(0)
    variants = {}
    for name, (num_images, num_classes) in SIZES.items():
        labels = rng.permutation(np.arange(num_images) % num_classes)
        variants[f"{name}, {num_images:,} labels"] = partial(seconds_to_select, labels)
    with tempfile.TemporaryDirectory() as temporary:
        for title, name in LISTS.items():
            root = Path(temporary) / name
            root.mkdir()
            lists = prepare(name, root, args.annotations)
            made = "made" if lists == root else "real"
            lines = KNOWN[name].lists.splits["train"].images
            variants[f"{title}, {made} lists, {lines:,} lines"] = partial(seconds_to_build, name, root, lists)
        make_folder(Path(temporary) / "folder", args.files)
        scan = partial(seconds_to_scan, Path(temporary) / "folder", args.files)
        variants[f"folder by class, {args.files:,} files"] = scan
        figures = {name: summary(values) for name, values in alternate(variants, args.rounds).items()}
    show(figures)
    slowest = max(figure["median"] for figure in figures.values())
    record("split", args, dict(seconds=figures))
    print(f"slowest {slowest:.3f} s")


if __name__ == "__main__":
    main()

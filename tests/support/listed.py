"""Tiny ImageNet-LT: annotation lists, image files, and the images as parquet."""

import io
import zlib
from dataclasses import replace
from itertools import chain
from pathlib import Path

import datasets
from datasets import Dataset, Features, Value
from PIL import Image

from ride_timm.data.datasets import KNOWN, SplitFacts

CLASSES = ("n01440764", "n01443537", "n15075141")
LISTS = {
    "train": [f"train/{CLASSES[c]}/{CLASSES[c]}_{i}.JPEG {c}" for c, n in enumerate((7, 4, 2)) for i in range(n)],
    "val": [f"train/{name}/{name}_{i}.JPEG {c}" for c, name in enumerate(CLASSES) for i in (100, 101)],
    "test": [f"val/{n}/ILSVRC2012_val_{10 * c + i:08d}.JPEG {c}" for c, n in enumerate(CLASSES) for i in range(3)],
}


def known_lists(monkeypatch, name: str, splits: dict[str, SplitFacts] | None = None, num_classes: int = 3) -> None:
    """Replace the published facts of a data set's lists by a tiny one's."""
    lists = replace(KNOWN[name].lists, num_classes=num_classes, splits=splits or {})
    monkeypatch.setitem(KNOWN, name, replace(KNOWN[name], lists=lists))


def shade(file: str) -> int:
    """The gray value of an image, from its file name."""
    return zlib.crc32(Path(file).name.encode()) % 256


def jpeg(file: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (shade(file),) * 3).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_lists(folder: Path, prefix: str = "ImageNet_LT", lists: dict[str, list[str]] = LISTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in lists.items():
        (folder / f"{prefix}_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_images(root: Path) -> Path:
    for line in chain(*LISTS.values()):
        path = root / line.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(path.name))
    return root


def write_rows(root: Path, num_shards: int = 3) -> Path:
    """Write parquet shards like the Hub's ImageNet.

    File names end in the class, and some of the images are in no list.
    """
    features = Features(image=datasets.Image(), label=Value("int64"))
    splits = {"train": LISTS["val"] + LISTS["train"], "validation": LISTS["test"]}
    for split, lines in splits.items():
        lines = [*lines, *(f"x/{CLASSES[c]}/{CLASSES[c]}_{i}.JPEG {c}" for c in range(3) for i in range(900, 905))]
        lines.sort(key=lambda line: zlib.crc32(line.encode()))
        for shard in range(num_shards):
            rows = [line.split() for line in lines[shard::num_shards]]
            names = [f"{Path(file).stem}_{CLASSES[int(label)]}.JPEG" for file, label in rows]
            images = [{"bytes": jpeg(file), "path": name} for (file, _), name in zip(rows, names, strict=True)]
            part = Dataset.from_dict({"image": images, "label": [int(c) for _, c in rows]}, features=features)
            path = root / "data" / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(path)
    return root

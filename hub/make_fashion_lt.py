"""Make the embedded data set: a small long-tailed Fashion-MNIST, from the original IDX files.

    python hub/make_fashion_lt.py FOLDER [--output DIR]

FOLDER holds train-images-idx3-ubyte.gz and its three companions (https://github.com/zalandoresearch/fashion-mnist;
Debian's package dataset-fashion-mnist has them too). The same files give the same rows, labels and pixels every time.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from ride_timm.data.longtail import class_sizes, longtail_indices

CLASS_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
NUM_CLASSES = len(CLASS_NAMES)
TRAIN_MAX, TEST_EACH, IMB_FACTOR, SEED = 1000, 100, 0.01, 0
OUTPUT = Path(__file__).parents[1] / "ride_timm" / "data" / "fashion_lt"


def read_idx(path: Path) -> np.ndarray:
    """The array of a gzipped IDX file of unsigned bytes: images [N, 28, 28] or labels [N]."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"error: {path} is not an IDX file of unsigned bytes")
    num_axes = data[3]
    shape = np.frombuffer(data, ">u4", num_axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def choose(labels: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The first `sizes` rows of each class in the order of the seeded split, grouped by class."""
    shuffled = longtail_indices(labels, "exp", 1.0, SEED, len(sizes))  # factor 1 keeps every row, shuffled by class
    return np.concatenate([shuffled[labels[shuffled] == c][:size] for c, size in enumerate(sizes)])


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def build(folder: Path, prefix: str, sizes: list[int]) -> Dataset:
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    rows = choose(labels, sizes)
    columns = {"image": [{"bytes": png(images[row]), "path": None} for row in rows], "label": labels[rows].tolist()}
    return Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(names=CLASS_NAMES)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the four .gz files")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    train_sizes = class_sizes(TRAIN_MAX * NUM_CLASSES, NUM_CLASSES, "exp", IMB_FACTOR)
    for split, prefix, sizes in (("train", "train", train_sizes), ("test", "t10k", [TEST_EACH] * NUM_CLASSES)):
        path = args.output / f"{split}.parquet"
        build(args.folder, prefix, sizes).to_parquet(path)
        print(f"{path}: {sum(sizes)} images {sizes}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Folders of random images by split and class, told apart by their colour."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_class_folders(
    root: Path, counts: dict[str, tuple[int, ...]], size: tuple[int, int], name: str, suffix: str
) -> Path:
    """Write counts[split][c] images of `size` (height, width) as root/split/NAMEc/000.SUFFIX, and so on; -> root."""
    rng = np.random.default_rng(0)
    for split, by_class in counts.items():
        for label, count in enumerate(by_class):
            folder = root / split / f"{name}{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (*size, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i:03d}{suffix}")
    return root

"""Example images of the demo, from the data set embedded in the package."""

from __future__ import annotations

from pathlib import Path

from ...data.datasets import EMBEDDED
from ...data.hub import read_splits


def write_examples(dataset: str | None, folder: Path, most: int = 5) -> list[Path]:
    """Write test images of classes from head to tail; none for a data set that is not embedded."""
    if dataset not in EMBEDDED:
        return []
    from datasets import Image

    test = read_splits(dataset, None)["test"].cast_column("image", Image(decode=False))
    labels, names = list(test["label"]), test.features["label"].names
    paths = []
    for k in range(most):
        label = round(k * (len(names) - 1) / (most - 1))
        path = folder / f"{names[label].replace('/', '-')}.png"
        path.write_bytes(test[labels.index(label)]["image"]["bytes"])
        paths.append(path)
    return paths

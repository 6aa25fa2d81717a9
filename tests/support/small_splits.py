"""`datasets` splits of a few images."""

import io

import datasets
from datasets import Dataset, DatasetDict, Features, Value
from PIL import Image


def png(value: int = 0, mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def split(labels, label="label", image="image", feature=None, data=None) -> Dataset:
    """Split of these labels; without `data` its images cannot be decoded."""
    data = [b"not an image"] * len(labels) if data is None else data
    features = Features({image: datasets.Image(), label: feature or Value("int64")})
    encoded = [d and {"bytes": d, "path": None} for d in data]
    return Dataset.from_dict({image: encoded, label: labels}, features=features)


def saved(tmp_path, **splits) -> str:
    """Write these splits to a folder as `save_to_disk` does -> its path."""
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")

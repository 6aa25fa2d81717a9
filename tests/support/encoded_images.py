"""Encoded images, and image sets of them."""

import io

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from PIL import Image, ImageOps

from ride_timm.data.image_set import ImageSet

ORIENTATION = 0x0112


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Image of slow waves in every channel; no two corners are alike."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([np.sin(4 * x + 3 * y), np.cos(5 * y - x), np.sin(6 * x * y), np.cos(3 * x)])
    bands = [Image.fromarray(wave) for wave in (127.5 + 127.5 * waves).astype(np.uint8)]
    return Image.merge(mode, bands[: len(Image.new(mode, (1, 1)).getbands())])


def encoded(image: Image.Image, kind: str = "JPEG", orientation: int | None = None, **options) -> bytes:
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, **{"quality": 95, **options} if kind == "JPEG" else options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def plainly(data: bytes) -> Image.Image:
    """Decode in full resolution, apply the EXIF orientation, convert to RGB."""
    return ImageOps.exif_transpose(opened(data)).convert("RGB")


def image_set(*data: bytes | None) -> ImageSet:
    features = Features(image=datasets.Image())
    images = Dataset.from_dict({"image": [d and {"bytes": d, "path": None} for d in data]}, features=features)
    return ImageSet(images, np.arange(len(data)), np.arange(len(data)) % 2, "image")


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    assert a.size == b.size and a.mode == b.mode == "RGB"
    return np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))


def png_set(n: int = 13, size: tuple[int, int] = (32, 32), num_classes: int = 3, broken: int | None = None) -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in range(n)]
    data = [b"junk" if i == broken else encoded(Image.fromarray(p), "PNG") for i, p in enumerate(pixels)]
    rows = [{"bytes": d, "path": None} for d in data]
    features = Features(img=datasets.Image(), other=Value("int64"))
    images = Dataset.from_dict({"img": rows, "other": [0] * n}, features=features).select_columns(["img"])
    return ImageSet(images, np.arange(n), np.arange(n) % num_classes, "img")

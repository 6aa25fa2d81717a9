"""Image sets: items decoded in full, images opened from bytes, files and columns with a mode."""

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features
from encoded_images import difference, encoded, image_set, plainly, smooth

from ride_timm.data.augment.images import build_crop
from ride_timm.data.image_set import ImageSet
from ride_timm.errors import RunError


def test_items_of_a_set_are_decoded_in_full(decoded):
    data = encoded(smooth(700, 500), orientation=6)
    image, label = image_set(data)[0]
    assert difference(image, plainly(data)).max() == 0 and image.size == (500, 700) and label == 0
    assert decoded[0] == (700, 500)


def test_files_and_modes_of_the_column(tmp_path):
    data = encoded(smooth(640, 480))
    (tmp_path / "a.jpg").write_bytes(data)
    dataset = Dataset.from_dict({"image": [str(tmp_path / "a.jpg")]}, features=Features(image=datasets.Image()))
    crop = build_crop("imagenet", train=False, input_size=48)
    by_path = ImageSet(dataset, np.arange(1), np.zeros(1, dtype=np.int64), "image")
    by_bytes = image_set(data)
    assert difference(by_path.read(0, crop)[0], by_bytes.read(0, crop)[0]).max() == 0
    gray = ImageSet(
        dataset.cast_column("image", datasets.Image(mode="L")), np.arange(1), np.zeros(1, dtype=np.int64), "image"
    )
    assert difference(gray[0][0], plainly(data).convert("L").convert("RGB")).max() == 0
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(RunError, match=r"row 0 of split 'train' cannot be read \(FileNotFoundError"):
        by_path.read(0, crop)

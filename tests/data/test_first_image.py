"""The size of the first training image, of every form of a data set."""

import datasets
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
from datasets import DatasetDict
from PIL import Image
from pyarrow import parquet
from small_splits import png, split

from ride_timm.data.first_image import first_image_size


@pytest.fixture(autouse=True)
def undecoded(monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))


def write(path, size=(7, 5), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)


@pytest.mark.parametrize("train", ["train", "Train", "training", "."])
def test_a_folder_of_images(tmp_path, train):
    write(tmp_path / train / "bee" / "deep" / "1.JPG")
    write(tmp_path / train / "cat" / "1.png", (9, 9))
    if train != ".":
        write(tmp_path / "eval" / "ant" / "1.png", (3, 3))
    (tmp_path / train / "bee" / "0.txt").write_text("no image")
    assert first_image_size(str(tmp_path)) == first_image_size("photos", tmp_path) == (7, 5)


@pytest.mark.parametrize(("orientation", "expected"), [(1, (7, 5)), (3, (7, 5)), (6, (5, 7)), (8, (5, 7))])
def test_the_size_is_that_of_the_upright_image(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "ant" / "1.jpg", exif=exif)
    assert first_image_size(str(tmp_path)) == expected


@pytest.mark.parametrize("form", ["saved", "parquet", "file", "folders of parquet"])
def test_rows(tmp_path, form):
    train, test = split([0], data=[png(size=(7, 5))], image="photo"), split([0], data=[png(size=(3, 3))], image="photo")
    path = tmp_path / "data"
    if form == "saved":
        DatasetDict(train=train, test=test).save_to_disk(path)
    else:
        inside = "{}/0.parquet" if form == "folders of parquet" else "{}.parquet"
        for name, part in (("train", train), ("test", test)):
            (path / inside.format(name)).parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(path / inside.format(name))
    path = path / "train.parquet" if form == "file" else path
    assert first_image_size(str(path)) == first_image_size(str(path), image_column="photo") == (7, 5)
    assert first_image_size(str(path), image_column="label") is None


@pytest.mark.parametrize("form", ["bytes", "relative", "csv"])
@pytest.mark.parametrize("folder", [False, True])
def test_columns_that_pandas_writes(tmp_path, form, folder):
    write(tmp_path / "photos" / "0.png")
    images = [None, png(size=(7, 5))] if form == "bytes" else [None, "photos/0.png"]
    path = tmp_path / f"train.{'csv' if form == 'csv' else 'parquet'}"
    table = pa.table({"label": ["a.png", "b.png"], "picture": images})
    (pa_csv.write_csv if form == "csv" else parquet.write_table)(table, path)
    assert first_image_size(str(tmp_path if folder else path)) == (7, 5)


@pytest.mark.parametrize("name", ["Training", "full", "TRAIN"])
def test_the_training_split_by_other_names(tmp_path, name):
    DatasetDict({name: split([0], data=[png(size=(7, 5))])}).save_to_disk(tmp_path / "data")
    assert first_image_size(str(tmp_path / "data")) == (7, 5)


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_set_is_streamed_where_the_hub_is_in_reach(monkeypatch, offline):
    part = split([0, 1], data=[png(size=(7, 5)), b"never read"])

    def load_dataset(hub_id, **how):
        assert hub_id == "me/mine" and how == ({} if offline else {"streaming": True})
        return DatasetDict(train=part) if offline else {"train": part.to_iterable_dataset()}

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert first_image_size("me/mine") == (7, 5)


def test_lists_and_the_embedded_set(tmp_path):
    write(tmp_path / "images" / "b.png")
    (tmp_path / "my_train.txt").write_text("images/b.png 0\n")
    assert first_image_size("mine", tmp_path, annotations=tmp_path) == (7, 5)
    assert first_image_size("fashion_lt") == (28, 28)


@pytest.mark.parametrize("dataset", ["nowhere", "", "me/mine", "places_lt", "{tmp}", "{tmp}/broken", "{tmp}/a.txt"])
def test_none_if_it_cannot_be_known(tmp_path, dataset):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"junk")
    (tmp_path / "a.txt").write_text("text")
    assert first_image_size(dataset.replace("{tmp}", str(tmp_path))) is None

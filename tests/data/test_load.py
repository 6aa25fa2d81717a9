"""Data sets as users have them: good, wrong and hostile. Everything offline; images are decoded only when asked for."""

import importlib.util
import os
import struct
from gzip import compress
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Features
from forked import run_python
from small_splits import png, saved, split

from ride_timm.data.image_set import ImageSet
from ride_timm.data.load import hold_out, load_longtail
from ride_timm.data.longtail import class_sizes, longtail_indices
from ride_timm.errors import InputError, RunError

ROOT = Path(__file__).parents[2]


def test_embedded_set():
    data = load_longtail("fashion_lt", imb_type="none")
    assert data.class_counts == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
    assert data.num_classes == 10 and data.class_names[-1] == "Ankle boot" and data.name == "fashion_lt"
    assert np.bincount(data.test.labels).tolist() == [100] * 10
    image, label = data.train[0]
    assert image.mode == "RGB" and image.size == (28, 28) and label == 0
    assert data.train.image_column == "image" and data.test.split == "test"


def test_embedded_files_carry_their_features_and_stay_small():
    folder = ROOT / "ride_timm" / "data" / "fashion_lt"
    read = datasets.load_dataset("parquet", data_files={"train": str(folder / "train.parquet")})["train"]
    assert read.features == Features(image=datasets.Image(), label=ClassLabel(names=read.features["label"].names))
    assert datasets.load_dataset(str(folder))["test"].num_rows == 1000  # the card's front matter agrees
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000


def test_embedded_set_can_be_made_again(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("make_fashion_lt", ROOT / "hub" / "make_fashion_lt.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    rng = np.random.default_rng(0)
    originals = {}
    for prefix, per_class in (("train", 1050), ("t10k", 110)):
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
        shades = rng.integers(0, 256, (len(labels), 1, 1), dtype=np.uint8)
        images = shades.repeat(28, 1).repeat(28, 2)  # plain, so quick to pack
        originals[prefix] = images, labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(compress(header + array.tobytes(), 1))
    for output in ("one", "two"):
        maker.main([str(tmp_path), "--output", str(tmp_path / output)])
    assert (tmp_path / "one" / "test.parquet").read_bytes() == (tmp_path / "two" / "test.parquet").read_bytes()

    data = load_longtail("made", tmp_path / "one", imb_type="none")
    assert data.class_counts == class_sizes(10_000, 10, "exp", 0.01)
    images, labels = originals["t10k"]
    rows = longtail_indices(labels, "exp", 1.0)  # 110 of each class, shuffled: the first 100 are taken
    for i in (0, 99, 100, 999):
        row = rows[i // 100 * 110 + i % 100]
        assert data.test[i][1] == labels[row]
        np.testing.assert_array_equal(np.asarray(data.test[i][0])[..., 0], images[row])


def test_split_is_made_from_labels_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 50))
    path = saved(tmp_path, train=split(labels), test=split([0, 1, 2, 3]))
    data = load_longtail(path, imb_type="exp", imb_factor=0.1, seed=2)
    rows = longtail_indices(labels, "exp", 0.1, seed=2)
    assert data.train.rows.tolist() == rows.tolist()
    assert data.train.labels.tolist() == labels[rows].tolist()
    assert data.class_counts == class_sizes(200, 4, "exp", 0.1)
    held = hold_out(data.train, 0.2, seed=0)
    assert len(held[0]) + len(held[1]) == len(data.train)


def test_corrupt_missing_and_empty_images_name_split_and_row(tmp_path):
    path = saved(
        tmp_path, train=split([0, 0, 1, 1], data=[png(), b"junk", png(size=(99, 99))[:-40], None]), test=split([0])
    )
    data = load_longtail(path, imb_type="none")
    assert data.train[0][1] == 0
    for i in (1, 2, 3):
        with pytest.raises(RunError, match=f"image in row {i} of split 'train'") as error:
            data.train[i]
        assert "\n" not in str(error.value) and " at 0x" not in str(error.value)
    with pytest.raises(RunError, match="row 2 of split 'train'"):
        data.train.select([3, 2])[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = saved(tmp_path, train=split([0], data=[png(77, mode)]), test=split([0]))
    image, _ = load_longtail(path, imb_type="none").train[0]
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (77, 77, 77)


def test_parquet_folder(tmp_path):
    for name, labels in (("train", [0, 1, 0]), ("test", [1, 0])):
        split(labels, "fine_label", "img", ClassLabel(names=["cat", "dog"])).to_parquet(tmp_path / f"{name}.parquet")
    for data in (load_longtail(str(tmp_path), imb_type="none"), load_longtail("cifar100", tmp_path, imb_type="none")):
        assert data.class_names == ("cat", "dog") and data.class_counts == [2, 1]
        assert data.train.image_column == "img" and data.test.labels.tolist() == [1, 0]
    assert data.name == "cifar100"
    with pytest.raises(InputError, match="no test split, and no class has the 3 images"):
        load_longtail(str(tmp_path / "train.parquet"), imb_type="none")


def test_folders_of_images(tmp_path):
    for part, name in (("train", "ant"), ("train", "bee"), ("test", "ant"), ("test", "bee")):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(png(9, "L", (5, 3)))
    data = load_longtail(str(tmp_path), imb_type="none")
    assert data.class_names == ("ant", "bee") and data.class_counts == [1, 1]
    assert data.test[1][0].size == (5, 3)


@pytest.mark.parametrize(
    "present, expected",
    [
        (["test", "validation", "val"], "test"),
        (["val", "validation"], "validation"),
        (["val", "Eval", "small"], "Eval"),
        (["VAL", "testing_set"], "testing_set"),
        (["extra", "Dev"], "Dev"),
    ],
)
def test_default_test_split(tmp_path, present, expected):
    path = saved(tmp_path, Training=split([0]), **{name: split([0]) for name in present})
    data = load_longtail(path, imb_type="none")
    assert data.test.split == expected and data.train.split == "Training"
    assert data.test_source == f"split {expected}" and data.notice is None
    assert load_longtail(path, imb_type="none", test_split=present[0].upper()).test.split == present[0]


@pytest.mark.parametrize("name", ["train", "Train", "full"])
def test_without_a_test_split_a_fifth_of_each_class_is_held_out(tmp_path, name):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [50, 12, 3, 2, 1]))
    path = saved(tmp_path, **{name: split(labels.tolist())})
    data = load_longtail(path, seed=3)
    assert np.bincount(data.test.labels).tolist() == [10, 2, 1]  # 2 and 1 images are too few
    assert data.class_counts == [40, 10, 2, 2, 1]
    rest, held = hold_out(ImageSet(data.test.images, np.arange(68), labels, "image"), 0.2, seed=3)
    assert data.train.rows.tolist() == rest.rows.tolist() and data.test.rows.tolist() == held.rows.tolist()
    assert labels[data.test.rows].tolist() == data.test.labels.tolist()
    assert data.test_source == f"0.2 of {name}, held out with seed 3" and data.test_source in data.notice
    assert data.notice.endswith("; 2 of 5 classes have too few images for one: 3, 4")
    assert load_longtail(path, seed=4).test.rows.tolist() != data.test.rows.tolist()
    tailed = load_longtail(path, imb_type="none", label_column="label", test_split=None)
    assert len(tailed.train) + len(tailed.test) == 68 and tailed.split_names == (name, "test")


def test_the_long_tail_is_selected_from_what_is_not_held_out(tmp_path):
    data = load_longtail(saved(tmp_path, train=split([0, 1] * 50)), imb_type="exp", imb_factor=0.1)
    assert data.class_counts == [40, 4] and np.bincount(data.test.labels).tolist() == [10, 10]
    assert not set(data.train.rows) & set(data.test.rows) and data.available == 80


@pytest.mark.parametrize(
    "splits, message",
    [
        (["train", "extra"], "no split test or validation; pass --test-split, one of extra"),
        (["test"], "no split 'train'; it has test"),
        (["a", "b"], "no split 'train'; it has a, b"),
    ],
)
def test_splits_that_need_a_name(tmp_path, splits, message):
    with pytest.raises(InputError, match=message):
        load_longtail(saved(tmp_path, **{name: split([0] * 5) for name in splits}))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_column": "pixels"}, "no column 'pixels'; it has image, label"),
        ({"image_column": "label"}, "column 'label' does not hold images"),
        ({"label_column": "class"}, "no column 'class'; it has image, label"),
        ({"train_split": "training"}, "no split 'training'; it has train, test"),
        ({"test_split": "dev"}, "no split 'dev'; it has train, test"),
        ({"test_split": "train"}, "cannot be both"),
        ({"imb_factor": 100}, "papers write IF 100"),
        ({"imb_type": "linear"}, "unknown imbalance type"),
        ({"imb_type": "exp", "imb_factor": 0.01}, "leaves no image for 1 of 2 classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, arguments, message):
    path = saved(tmp_path, train=split([0, 1, 0, 1]), test=split([0, 1]))
    with pytest.raises(InputError, match=message):
        load_longtail(path, **{"imb_type": "none", **arguments})


@pytest.mark.parametrize("empty", ["train", "test"])
def test_splits_without_images_are_refused(tmp_path, monkeypatch, empty):
    parts = {name: split([] if name == empty else [0, 1]) for name in ("train", "test")}
    for name, part in parts.items():
        part.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=f"{empty}.* corresponds to no data!; .* no empty split"):
        load_longtail(str(tmp_path), imb_type="none")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: DatasetDict(parts))
    with pytest.raises(InputError, match=f"split '{empty}' has zero images"):
        load_longtail(str(tmp_path), imb_type="none")


def test_a_test_set_may_lack_classes(tmp_path):
    path = saved(tmp_path, train=split([0, 1, 2]), test=split([1]))
    assert load_longtail(path, imb_type="none").num_classes == 3


def test_paths_that_hold_no_data_set_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"folder .*nowhere' does not exist"):
        load_longtail("cifar10", tmp_path / "nowhere")
    for name in ("imagenette", "./nowhere", "a/b/c", "", "~/no such folder"):
        with pytest.raises(InputError, match=r"unknown data set .* imagenet_lt, .* nor a Hub id owner/name"):
            load_longtail(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot read a data set from .*empty") as error:
        load_longtail(str(tmp_path / "empty"))
    assert "\n" not in str(error.value) and error.value.__cause__ is not None
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="is a file; give the folder"):
        load_longtail(str(tmp_path / "notes.txt"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"cannot read a data set from .*broken"):
        load_longtail(str(tmp_path / "broken"))


@pytest.mark.parametrize(
    "name, hub_id", [("cifar100", "uoft-cs/cifar100"), ("cifar10", "uoft-cs/cifar10"), ("me/mine", "me/mine")]
)
def test_hub_ids_and_a_hub_out_of_reach(tmp_path, monkeypatch, name, hub_id):
    def offline(path, *_, **__):
        assert path == hub_id
        raise ConnectionError("Couldn't reach the Hub\nTraceback (most recent call last)")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=f"https://huggingface.co/datasets/{hub_id}.* --data-dir") as error:
        load_longtail(name)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    assert isinstance(error.value.__cause__, ConnectionError)

    part = DatasetDict(train=split([0, 0, 1, 1]), test=split([0, 1]))
    monkeypatch.setattr(datasets, "load_dataset", lambda path: part if path == hub_id else pytest.fail(path))
    assert load_longtail(name, imb_type="exp", imb_factor=0.5).class_counts == [2, 1]


def test_reading_restores_the_progress_bars(tmp_path):
    path = saved(tmp_path, train=split([0]), test=split([0]))
    enabled = datasets.utils.are_progress_bars_disabled()
    load_longtail(path, imb_type="none")
    assert datasets.utils.are_progress_bars_disabled() == enabled


def test_importing_the_module_does_not_import_datasets():
    ran = run_python("-c", "import sys, ride_timm.data.load, ride_timm.data.loaders; print('datasets' in sys.modules)")
    assert ran.stdout == "False\n", ran.stderr


def test_hold_out_is_stratified_seeded_and_spares_single_images(tmp_path):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [100, 21, 5, 2, 1]))
    data = load_longtail(saved(tmp_path, train=split(labels), test=split([0])), imb_type="none")
    rest, held = hold_out(data.train, 0.1, seed=0)
    assert np.bincount(held.labels, minlength=5).tolist() == [10, 2, 1, 0, 0]
    assert sorted([*rest.rows, *held.rows]) == list(range(len(labels)))
    assert (np.diff(rest.rows) > 0).all() and (np.diff(held.rows) > 0).all()
    assert held.labels.tolist() == labels[held.rows].tolist()
    assert np.array_equal(hold_out(data.train, 0.1, seed=0)[1].rows, held.rows)
    assert not np.array_equal(hold_out(data.train, 0.1, seed=1)[1].rows, held.rows)
    assert np.bincount(hold_out(data.train, 0.5, seed=0)[0].labels).min() == 1


@pytest.mark.parametrize("fraction", [0, -0.1, 0.51, 1, float("nan"), "0.1", True])
def test_hold_out_refuses_other_fractions(tmp_path, fraction):
    data = load_longtail("fashion_lt")
    with pytest.raises(InputError, match=r"outside \(0, 0\.5\]"):
        hold_out(data.train, fraction, seed=0)


def test_hold_out_of_nothing_is_refused():
    train = load_longtail("fashion_lt").train
    with pytest.raises(InputError, match="holds out none; raise it"):
        hold_out(train.select([0, 2400]), 0.1, seed=0)
    with pytest.raises(InputError, match="seed -1"):
        hold_out(train, 0.1, seed=-1)


@pytest.mark.skipif(
    "RIDE_TIMM_CIFAR100" not in os.environ, reason="set RIDE_TIMM_CIFAR100 to a local copy of CIFAR-100 to run this"
)
def test_real_cifar100():
    data = load_longtail("cifar100", os.environ["RIDE_TIMM_CIFAR100"])
    assert len(data.train) == 10_847 and len(data.test) == 10_000
    assert data.class_counts == class_sizes(50_000, 100, "exp", 0.01)
    assert data.class_names[:2] == ("apple", "aquarium_fish")
    assert data.train[0][0].size == (32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(imb_factor=0.1), r"long-tailed already"),
        (dict(imb_type="exp", seed=1), r"long-tailed already"),
        (dict(imb_type="step"), r"long-tailed already"),
        (dict(data_dir="elsewhere"), r"name the data set that 'elsewhere' holds"),
    ],
)
def test_the_embedded_set_is_not_another_one(settings, message):
    with pytest.raises(InputError, match=message):
        load_longtail("fashion_lt", **settings)

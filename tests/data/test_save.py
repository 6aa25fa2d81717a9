"""Saved selections: the same images, labels, classes and splits as the data they come from, without the rest."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from commands import output, refusal
from encoded_images import difference, encoded, opened, plainly, smooth
from listed import LISTS, known_lists, write_images, write_lists, write_rows
from PIL import Image
from small_splits import png, split

from ride_timm.cli.main import main
from ride_timm.data.load import load_longtail
from ride_timm.data.loaders import make_loader
from ride_timm.data.save import save_longtail, shrunk
from ride_timm.errors import InputError, RunError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    known_lists(monkeypatch, "imagenet_lt")


def balanced(root):
    """20 images of each of 3 classes in an order of their own, as parquet files like CIFAR's."""
    labels = np.random.default_rng(0).permutation(np.arange(60) % 3).tolist()
    names = datasets.ClassLabel(names=["ant", "bee", "cat"])
    root.mkdir()
    for name in ("train", "test"):
        pictures = [png(i) for i in range(60)]
        split(labels, "fine_label", "img", names, pictures).to_parquet(root / f"{name}.parquet")
    return root


def assert_same(found, expected):
    assert found.class_names == expected.class_names and found.class_counts == expected.class_counts
    pairs = [(found.train, expected.train), (found.test, expected.test)]
    if expected.val is not None:
        pairs.append((found.val, expected.val))
    for one, other in pairs:
        assert one.labels.tolist() == other.labels.tolist()
        assert all(np.array_equal(one[i][0], other[i][0]) for i in range(len(other)))


def test_a_long_tailed_selection_is_read_as_it_was(tmp_path):
    source, output = balanced(tmp_path / "cifar"), tmp_path / "saved"
    expected = load_longtail("cifar10", source, imb_factor=0.1, seed=3)
    save_longtail(output, "cifar10", source, imb_factor=0.1, seed=3)
    with_name = load_longtail("cifar10", output, imb_factor=0.1, seed=3)  # selected already, not once more
    alone = load_longtail(str(output))
    assert sum(part.num_rows for part in datasets.load_from_disk(output).values()) == len(expected.train) + 60
    for found in (with_name, alone):
        assert_same(found, expected)
        assert (found.train.split, found.test.split) == ("train", "test")
        batches = [make_loader(data.train, "cifar", train=True, batch_size=8, seed=0) for data in (found, expected)]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(*batches, strict=True))


@pytest.mark.parametrize("rows", [False, True])
def test_listed_images_are_read_without_lists_and_sources(tmp_path, rows):
    source, lists = (write_rows if rows else write_images)(tmp_path / "source"), write_lists(tmp_path / "lists")
    expected = load_longtail("imagenet_lt", source, annotations=lists, use_val=True)
    pixels = [[np.asarray(part[i][0]) for i in range(len(part))] for part in (expected.train, expected.test)]
    output = tmp_path / "saved"
    save_longtail(output, "imagenet_lt", source, annotations=lists)
    found = load_longtail("imagenet_lt", output, use_val=True)
    assert_same(found, expected)
    assert [part.split for part in (found.train, found.test, found.val)] == ["train", "test", "val"]
    shutil.rmtree(source)
    shutil.rmtree(lists)
    found = load_longtail("imagenet_lt", output)
    for part, images in zip((found.train, found.test), pixels, strict=True):
        assert all(np.array_equal(part[i][0], image) for i, image in enumerate(images))


@pytest.mark.parametrize(
    ("size", "orientation", "expected"),
    [((300, 200), None, (96, 64)), ((200, 301), 6, (96, 64)), ((96, 20), None, None), ((500, 2), None, (96, 1))],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_is_shrunk_to_its_longer_side_and_stands_upright(size, orientation, expected, kind):
    data = encoded(smooth(*size), kind, orientation=orientation)
    found = shrunk(opened(data), 96)
    if expected is None:
        assert found is None
        return
    image = opened(found)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", expected)
    reference = plainly(data).resize(expected, Image.Resampling.BICUBIC)
    assert difference(image, reference).mean() < 3


def test_a_saved_set_of_shrunk_images_keeps_the_small_ones_byte_for_byte(tmp_path):
    pictures = {"train": [(300, 200), (64, 48)], "test": [(80, 120)]}
    for name, sizes in pictures.items():
        for i, size in enumerate(sizes):
            for label in ("ant", "bee"):
                path = tmp_path / "source" / name / label / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(smooth(*size)))
    output = tmp_path / "saved"
    save_longtail(output, str(tmp_path / "source"), max_side=96, workers=2)
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] == ["saved"]
    shutil.rmtree(tmp_path / "source")
    found = load_longtail(str(output))
    assert [found.train[i][0].size for i in range(4)] == [(96, 64), (64, 48)] * 2
    assert [found.test[i][0].size for i in range(2)] == [(64, 96)] * 2
    assert found.train._stored[1]["image"]["bytes"] == encoded(smooth(64, 48))
    assert found.train.labels.tolist() == [0, 0, 1, 1] and found.class_names == ("ant", "bee")
    with pytest.raises(InputError, match="max_side=0: expected 1 or more"):
        save_longtail(tmp_path / "other", str(output), max_side=0)


def test_an_unreadable_image_is_named_when_it_is_to_be_shrunk(tmp_path):
    for name in ("train", "test"):
        for label in ("ant", "bee"):
            path = tmp_path / "source" / name / label / "0.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(encoded(smooth(300, 200))[: 900 if (name, label) == ("train", "bee") else None])
    with pytest.raises(RunError, match=r"row 1 of split 'train'.* cannot be read"):
        save_longtail(tmp_path / "saved", str(tmp_path / "source"), max_side=96)
    assert not (tmp_path / "saved").exists()


def test_another_selection_than_the_saved_one_is_refused(tmp_path):
    source, output = balanced(tmp_path / "cifar"), tmp_path / "saved"
    save_longtail(output, "cifar10", source, imb_factor=0.1)
    for settings, message in (
        (dict(imb_factor=0.2), r"was saved with imb_factor=0\.1, not imb_factor=0\.2"),
        (dict(imb_factor=0.1, seed=1), "was saved with seed=0, not seed=1"),
        (dict(imb_type="none"), "was saved with imb_type=exp, not imb_type=none"),
        (dict(imb_factor=0.1, annotations=source), "leave --annotations out"),
    ):
        with pytest.raises(InputError, match=message):
            load_longtail("cifar10", output, **settings)
    with pytest.raises(InputError, match="saved with dataset=cifar10, not dataset=cifar100"):
        load_longtail("cifar100", output, imb_factor=0.1)


def test_a_test_set_that_was_held_out_is_remembered(tmp_path, colours):
    source, output = str(colours / "train"), tmp_path / "saved"
    expected = load_longtail(source, seed=3)
    save_longtail(output, source, seed=3)
    for found in (load_longtail(str(output)), load_longtail(source, output, seed=3)):
        assert_same(found, expected)
        assert found.test_source == expected.test_source == "0.2 of train, held out with seed 3"
        assert found.notice == expected.notice
    with pytest.raises(InputError, match="was saved with seed=3, not seed=4"):
        load_longtail(source, output, seed=4)


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path):
    source = balanced(tmp_path / "cifar")
    for target, settings, message in (
        (source, {}, "exists: pass a new one as --output"),
        (tmp_path / "saved", dict(streaming=True), "leave --streaming out"),
        (tmp_path / "saved", dict(imb_factor=0.001), "leaves no image"),
    ):
        with pytest.raises(InputError, match=message):
            save_longtail(target, "cifar10", source, **settings)
    root = write_lists(write_images(tmp_path / "images"))
    (root / LISTS["train"][1].split()[0]).unlink()
    with pytest.raises(RunError, match=r"saved' could not be written: FileNotFoundError"):
        save_longtail(tmp_path / "saved", "imagenet_lt", root)
    lists = write_lists(tmp_path / "lists", "mine", LISTS | {"train": [*LISTS["train"], LISTS["train"][0][:-1] + "1"]})
    with pytest.raises(InputError, match="of split 'train' is listed with two labels"):
        save_longtail(tmp_path / "saved", "mine", write_rows(tmp_path / "rows"), annotations=lists)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar", "images", "lists", "rows"]


def test_the_command_saves_a_folder_that_commands_read(tmp_path, capsys):
    source, target = balanced(tmp_path / "cifar"), tmp_path / "new" / "saved"
    flags = ["--data-dir", source, "--imb-factor", "0.1", "--json"]
    command = ["datasets", "save", "cifar10", *flags, "--output", target]
    assert json.loads(output(capsys, *command)) == dict(output=str(target), train=28, test=60, val=0)
    assert json.loads(output(capsys, "datasets", "show", target, "--json"))["class_counts"] == [20, 6, 2]
    assert "exists: pass a new one" in refusal(capsys, *command)
    assert "needs --output DIR" in refusal(capsys, "datasets", "save", "cifar10")


def test_a_saved_set_of_lists_is_checked_by_reading_it(tmp_path, capsys):
    source, lists = write_images(tmp_path / "source"), write_lists(tmp_path / "lists")
    save_longtail(tmp_path / "saved", "imagenet_lt", source, annotations=lists)
    main(["datasets", "check", "imagenet_lt", "--data-dir", str(tmp_path / "saved"), "--json"])
    assert json.loads(capsys.readouterr().out)["unreadable"] == []


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "3"])
def test_a_damaged_selection_is_refused(tmp_path, text):
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(InputError, match=r"selection\.json is not as `datasets save` wrote it .*: save the data set"):
        load_longtail("cifar10", tmp_path)

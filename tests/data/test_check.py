"""`datasets check` of a published data set: no problem, or exactly the problem there is."""

import pytest
from listed import CLASSES, LISTS, known_lists, write_images, write_lists, write_rows

from ride_timm.data.check import check_installation, format_installation
from ride_timm.data.datasets import KNOWN, LISTED, SplitFacts
from ride_timm.errors import InputError

FACTS = dict(train=SplitFacts(13, 7, 2), val=SplitFacts(6, 2, 2), test=SplitFacts(9, 3, 3))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    known_lists(monkeypatch, "imagenet_lt", FACTS)


def test_the_known_totals():
    """The published figures: Liu et al. 2019, arXiv:1904.05160; iNaturalist 2018's own page."""
    totals = {name: [facts.images for facts in KNOWN[name].lists.splits.values()] for name in LISTED}
    assert totals["places_lt"] == [62_500, 7_300, 36_500] and totals["inat18"] == [437_513, 24_426]
    for name in ("places_lt", "inat18"):
        published = KNOWN[name].lists
        for split, facts in published.splits.items():
            if split != "train":  # these are balanced
                assert facts.largest == facts.smallest == facts.images / published.num_classes


@pytest.mark.parametrize("rows", [False, True])
def test_a_complete_installation_has_no_problem(tmp_path, rows):
    root = (write_rows if rows else write_images)(tmp_path)
    found = check_installation("imagenet_lt", root, write_lists(tmp_path / "lists"))
    assert found["problems"] == [] and found["root"] == str(tmp_path)
    train = found["splits"]["train"]
    assert (train["lines"], train["classes"], train["largest"], train["smallest"]) == (13, 3, 7, 2)
    assert train["class_counts"] == [7, 4, 2] and train["missing"] == []
    assert "13 lines,     3 classes, 7 to 2 a class, 13 images there" in format_installation(found)
    alone = check_installation("imagenet_lt", None, tmp_path / "lists")
    assert alone["problems"] == [] and alone["root"] is None


def test_missing_and_empty_images_are_named_by_line_path_and_class(tmp_path):
    root = write_lists(write_images(tmp_path))
    gone = [0, 8, 12]
    for i in gone[:2]:
        (root / LISTS["train"][i].split()[0]).unlink()
    (root / LISTS["train"][12].split()[0]).write_bytes(b"")
    found = check_installation("imagenet_lt", root, None)
    paths = [str(root / LISTS["train"][i].split()[0]) for i in gone]
    missing = [dict(line=i + 1, path=path) for i, path in zip(gone, paths, strict=True)]
    assert found["splits"]["train"]["missing"] == missing
    assert found["problems"] == [
        f"train: 3 of 13 images are missing or empty, the first is that of line 1, {paths[0]}; by class: "
        f"{CLASSES[0]} 1 of 7, {CLASSES[1]} 1 of 4, {CLASSES[2]} 1 of 2"
    ]
    text = format_installation(found, num_missing=2)
    assert f"missing: train, line 9: {paths[1]}" in text and "train, … 1 more (--all)" in text and paths[2] not in text


def test_a_wrong_root_is_reported_once_per_list(tmp_path):
    found = check_installation("imagenet_lt", tmp_path, write_lists(tmp_path / "lists"))
    assert [p.split(" is under")[0] for p in found["problems"]] == [
        f"{split}: none of the {n} images" for split, n in (("train", 13), ("val", 6), ("test", 9))
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": LISTS["train"][:-3]}, "has 10 lines, expected 13 (3 too few)"),
        ({"train": LISTS["train"][:-2]}, "train: 1 of 3 classes have no line: 2"),
        ({"train": [*LISTS["train"], "train/a/new.JPEG 0"]}, "has 14 lines, expected 13 (1 too many)"),
        ({"train": [*LISTS["train"], "train/a/new.JPEG 0"]}, "1 classes have other counts than 2 to 7: class 0 has 8"),
        (
            {"train": [*LISTS["train"][:6], "train/x.JPEG 1", *LISTS["train"][7:]]},
            "smallest class have 6 and 2 lines, ex",
        ),
        (
            {"test": [*LISTS["test"][:-1], "val/b.JPEG 0"]},
            "test: 2 classes have other counts than 3: class 0 has 4, cla",
        ),
        ({"train": [*LISTS["train"][:-1], "train/a/new.JPEG 3"]}, "line 13 of"),
        ({"val": [*LISTS["val"][:-1], LISTS["val"][0]]}, f"line 6, {LISTS['val'][0].split()[0]} (line 1)"),
        ({"val": [*LISTS["val"][:-1], LISTS["train"][-1]]}, "train and val have 1 images in common, such as"),
        ({"test": None}, "test: there is no list ImageNet_LT_test.txt in"),
    ],
)
def test_lists_that_differ_from_the_published_ones(tmp_path, changed, message):
    lists = {split: lines for split, lines in (LISTS | changed).items() if lines is not None}
    found = check_installation("imagenet_lt", None, write_lists(tmp_path, lists=lists))
    assert any(message in problem for problem in found["problems"]), found["problems"]


def test_rows_that_are_missing(tmp_path):
    lists = write_lists(tmp_path / "lists", lists=LISTS | {"test": [*LISTS["test"][:-1], "val/n15075141/other.JPEG 2"]})
    found = check_installation("imagenet_lt", write_rows(tmp_path / "hub"), lists)
    assert len(found["problems"]) == 1 and "line 9: val/n15075141/other.JPEG" in found["problems"][0]


def test_nothing_to_check(tmp_path):
    with pytest.raises(InputError, match=r"no ImageNet_LT_train.txt"):
        check_installation("imagenet_lt", tmp_path, None)
    with pytest.raises(InputError, match="does not exist"):
        check_installation("imagenet_lt", tmp_path / "gone", tmp_path)

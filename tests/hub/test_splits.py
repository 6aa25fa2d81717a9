"""Names and cards of published splits; the push itself is tested in loopback/."""

import re

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub.utils import validate_repo_id
from PIL import Image as PILImage
from splits import main, read_split, split_name, write_split

from ride_timm.data.load import load_longtail
from ride_timm.training.recipe import Recipe


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory):
    """Images with fine and coarse labels, as CIFAR-100 has them, 24 of each fine class."""
    folder = tmp_path_factory.mktemp("two_labels")
    fine = np.arange(96) % 4
    features = Features(
        img=Image(),
        fine_label=ClassLabel(names=["ant", "bee", "cat", "dog"]),
        coarse_label=ClassLabel(names=["insect", "mammal"]),
    )
    pixels = [PILImage.new("RGB", (4, 4))] * len(fine)
    columns = dict(img=pixels, fine_label=fine.tolist(), coarse_label=(fine // 2).tolist())
    for split in ("train", "validation"):
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (dict(imb_factor=0.01), "cifar100_lt100"),
        (dict(imb_factor=0.1), "cifar100_lt10"),
        (dict(imb_factor=0.02), "cifar100_lt50"),
        (dict(imb_factor=0.005), "cifar100_lt200"),
        (dict(imb_factor=0.5), "cifar100_lt2"),
        (dict(imb_factor=0.4), "cifar100_lt2p5"),
        (dict(imb_factor=0.3), "cifar100_lt3p33333"),
        (dict(imb_factor=1e-6), "cifar100_lt1e06"),
        (dict(label_column="coarse_label"), "cifar100_lt100_coarse_label"),
        (dict(label_column="a (coarse)/label"), "cifar100_lt100_a_coarse_label"),
        (dict(imb_type="step", split_seed=3, label_column="y"), "cifar100_lt100_step_seed3_y"),
        (dict(dataset="org/Birds.v2"), "birds.v2_lt100"),
    ],
)
def test_different_splits_have_different_names(keys, name):
    assert split_name(Recipe(**dict(dict(dataset="cifar100"), **keys))) == name
    validate_repo_id(f"org/{name}")


@pytest.mark.parametrize(
    "keys",
    [
        dict(imb_factor=0.4),
        dict(imb_factor=0.5, imb_type="step", split_seed=1),
        dict(imb_factor=0.25, label_column="coarse_label", image_column="img", test_split="validation"),
    ],
)
def test_the_call_of_a_card_gives_the_rows_of_its_split(two_labels, tmp_path, keys):
    recipe = Recipe(dataset="cifar100", data_dir=str(two_labels), **keys)
    folder = write_split(recipe, "org/any", tmp_path)
    text = (folder / "README.md").read_text(encoding="utf-8")
    call = re.search(r"`(load_longtail\(.*\))`", text)[1]
    again = eval(call, dict(load_longtail=lambda dataset, **given: load_longtail(dataset, two_labels, **given)))
    written = read_split(str(folder), str(tmp_path / "cache"))
    assert again.train.rows.tolist() == written["index"].tolist()
    assert again.train.labels.tolist() == written["label"].tolist()
    assert f"imbalance factor {1 / keys['imb_factor']:g}," in text
    assert 'load_dataset("uoft-cs/cifar100", split="validation")' in text


def test_splits_by_other_labels_stand_beside_each_other(two_labels, tmp_path):
    for factor in ("0.5", "0.4"):
        for flags in ([], ["--label-column", "coarse_label"]):
            main(["cifar100", "--data-dir", str(two_labels), "--output", str(tmp_path), "--imb-factor", factor, *flags])
    stems = ("cifar100_lt2", "cifar100_lt2p5")
    assert {path.name for path in tmp_path.iterdir()} == {*stems, *(f"{stem}_coarse_label" for stem in stems)}

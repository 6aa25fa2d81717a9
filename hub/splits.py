"""Publish a long-tailed split as a Hub dataset of index lists, and read it back.

python hub/splits.py cifar100 [--imb-factor 0.01] [--data-dir DIR] [--namespace N] [--push]

writes hub/splits/cifar100_lt100/ (data/train.parquet with columns index and label, and a card). Without --push the
files of the upload are listed; after a push the split is read back by `datasets` and compared row by row.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from folder import CARD, HERE, repository
from huggingface_hub import DatasetCard, DatasetCardData, constants
from publish import check_access, hub_errors, make_api, print_upload, upload

from ride_timm import InputError, RunError
from ride_timm.cli.process import exit_code
from ride_timm.data.datasets import KNOWN
from ride_timm.data.image_set import ImageSet
from ride_timm.data.load import load_longtail
from ride_timm.files import write_text
from ride_timm.models.release import NAMESPACE
from ride_timm.training.arguments import Parser, add_flags, flags_given
from ride_timm.training.recipe import Recipe

TEMPLATE = HERE / "split_card.md.jinja"
SPLITS = HERE / "splits"
KEYS = ("data_dir", "dataset_config", "dataset_revision", "imb_type", "imb_factor", "split_seed", "image_column")
KEYS += ("label_column", "test_split")


def split_name(recipe: Recipe) -> str:
    """The data set, the imbalance factor as papers write it, and options off their defaults: cifar100_lt100."""
    factor = _factor(recipe).replace(".", "p").replace("+", "")  # 2.5 is 2p5, and 1e+06 no name of the Hub
    name = f"{recipe.dataset.rpartition('/')[2].lower()}_lt{factor}"
    name += "_step" if recipe.profile == "step" else ""
    name += f"_seed{recipe.split_seed}" if recipe.split_seed else ""
    return name + ("_" + re.sub(r"\W+", "_", recipe.label_column, flags=re.ASCII) if recipe.label_column else "")


def _factor(recipe: Recipe) -> str:
    """The imbalance factor as papers write it: 100 for 0.01."""
    return f"{1 / recipe.imb_factor:g}"


def _call(recipe: Recipe) -> str:
    """The Python call that computes the same rows from the data set on the Hub."""
    args = dict(imb_type=recipe.profile, imb_factor=recipe.imb_factor, seed=recipe.split_seed)
    names = ("image_column", "label_column", "test_split", "dataset_config", "dataset_revision")
    given = {name: getattr(recipe, name) for name in names}
    args |= {name: value for name, value in given.items() if value is not None}
    stated = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in args.items())
    return f"load_longtail({', '.join([json.dumps(recipe.dataset, ensure_ascii=False), *stated])})"


def write_split(recipe: Recipe, repo: str, root: Path = SPLITS) -> Path:
    """Write the folder of a split: its rows and labels as parquet, and its card.

    InputError for data that are not on the Hub, from which others take the images, or are long-tailed already.
    """
    from datasets import Dataset

    known = KNOWN.get(recipe.dataset)
    source = (known.hub_id if known.balanced else None) if known else recipe.dataset
    if source is None or "/" not in source or Path(recipe.dataset).exists():
        raise InputError(
            f"{recipe.dataset!r}: name cifar10, cifar100 or a Hub id; the index list refers to its images."
        )
    if recipe.profile == "none":
        raise InputError("imb_type=none takes every row: there is no split to publish.")
    data = load_longtail(**recipe.data_args)
    if data.test_held_out is not None:
        raise InputError(f"{recipe.dataset!r} has no test split: name one by test_split; a card refers to it.")
    folder = root / split_name(recipe)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    columns = {"index": data.train.rows, "label": data.train.labels}
    Dataset.from_dict(columns).to_parquet(folder / "data" / "train.parquet")
    counts = data.class_counts
    card_data = DatasetCardData(
        license="mit",
        task_categories=["image-classification"],
        source_datasets=[f"extended|{source}"],
        pretty_name=f"{recipe.dataset} long-tailed, index list ({folder.name})",
        tags=["long-tailed-recognition", "imbalanced-classification", "ride"],
        configs=[dict(config_name="default", data_files=[dict(split="train", path="data/train.parquet")])],
    )
    card = DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=folder.name,
        repo=repo,
        source=source,
        call=_call(recipe),
        test_split=data.test.split,
        label_column=recipe.label_column or "the label column",
        num_images=f"{len(data.train):,}",
        num_classes=data.num_classes,
        most=f"{max(counts):,}",
        least=f"{min(counts):,}",
        factor=_factor(recipe),
        imb_type=recipe.profile,
        seed=recipe.split_seed,
        class_counts=counts,
    )
    write_text(folder / CARD, card.content.rstrip() + "\n")
    return folder


def read_split(repo: str, cache_dir: str | None = None, token: str | bool | None = None) -> dict[str, np.ndarray]:
    """Read a published split: {"index", "label"}, int64 [n], in its order."""
    from datasets import load_dataset

    rows = load_dataset(repo, split="train", cache_dir=cache_dir, token=token)
    return {name: np.asarray(rows[name], dtype=np.int64) for name in ("index", "label")}


def check_split(found: dict[str, np.ndarray], train: ImageSet, where: str) -> None:
    """Raise RunError if the rows or labels that were read back differ from those of the split."""
    for name, expected in (("index", train.rows), ("label", train.labels)):
        if not np.array_equal(found[name], expected):
            raise RunError(f"{where}: column {name!r} differs from the published one.")


def publish_split(recipe: Recipe, repo: str, push: bool, root: Path = SPLITS) -> None:
    """Write the folder of a split, then list what a push uploads, or push and read the rows back."""
    if push:
        check_access(repo)
    folder = write_split(recipe, repo, root)
    if not push:
        return print_upload(folder, f"datasets/{repo}")
    upload(folder, repo, f"{folder.name}: index list", "dataset")
    with hub_errors(repo), tempfile.TemporaryDirectory() as cache:
        check_split(read_split(repo, cache, make_api().token), load_longtail(**recipe.data_args).train, repo)
    print(f"published {constants.ENDPOINT}/datasets/{repo} and read back row by row")


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("dataset", metavar="NAME|HUB-ID", help="cifar10, cifar100, or a data set of the Hub")
    parser.add_argument("--namespace", metavar="N", help=f"owner (default: RIDE_TIMM_HUB, or {NAMESPACE})")
    parser.add_argument("--push", action="store_true", help="upload it")
    parser.add_argument("--output", type=Path, default=SPLITS, metavar="DIR", help="folder of the splits")
    add_flags(parser, KEYS)
    args: Any = parser.parse_args(argv)
    recipe = Recipe(dataset=args.dataset).override({k: v for k, v in flags_given(args).items() if k != "dataset"})
    publish_split(recipe, repository(split_name(recipe), args.namespace), args.push, args.output)


if __name__ == "__main__":
    sys.exit(exit_code(main, None))

"""Known data sets: one table that everything else reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class SplitFacts(NamedTuple):
    """Images of a published list, and of its largest and smallest class."""

    images: int
    largest: int
    smallest: int


@dataclass(frozen=True)
class Lists:
    """Published annotation lists: PREFIX_train.txt, PREFIX_val.txt, ..."""

    prefix: str
    num_classes: int
    splits: dict[str, SplitFacts] = field(default_factory=dict)

    def name(self, split: str) -> str:
        """The file name of a split's list."""
        return f"{self.prefix}_{split}.txt"


@dataclass(frozen=True)
class KnownDataSet:
    """Facts of a data set.

    title, home: name and page of its long-tailed version, for cards; hub_id: its images on the Hub, if they are there.
    augment: its augmentation policy; recipe: the recipe that fits it best, if there is one.
    balanced: long-tailed subsets are selected from it; all others are long-tailed already.
    embedded: installed with the package; imb_factor: of the exponential selection with seed 0 that made it.
    lists: published annotation lists, which say what its images and classes are.
    """

    title: str
    home: str
    augment: str
    hub_id: str | None = None
    recipe: str | None = None
    balanced: bool = False
    embedded: bool = False
    imb_factor: float | None = None
    lists: Lists | None = None


_LONG_TAIL = "https://liuziwei7.github.io/projects/LongTail.html"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"

KNOWN = {
    "fashion_lt": KnownDataSet(
        "Fashion-MNIST-LT",
        "https://github.com/zalandoresearch/fashion-mnist",
        "fashion",
        "zalando-datasets/fashion_mnist",
        "fashion_lt",
        embedded=True,
        imb_factor=0.01,
    ),
    "cifar10": KnownDataSet("CIFAR10-LT", _CIFAR, "cifar", "uoft-cs/cifar10", "cifar10_lt", balanced=True),
    "cifar100": KnownDataSet("CIFAR100-LT", _CIFAR, "cifar", "uoft-cs/cifar100", "cifar100_lt", balanced=True),
    "imagenet_lt": KnownDataSet(
        "ImageNet-LT",
        _LONG_TAIL,
        "imagenet",
        "ILSVRC/imagenet-1k",
        "imagenet_lt_resnet50",
        lists=Lists(
            "ImageNet_LT",
            1000,
            dict(train=SplitFacts(115_846, 1280, 5), val=SplitFacts(20_000, 20, 20), test=SplitFacts(50_000, 50, 50)),
        ),
    ),
    "places_lt": KnownDataSet(
        "Places-LT",
        _LONG_TAIL,
        "imagenet",
        lists=Lists(
            "Places_LT",
            365,
            dict(train=SplitFacts(62_500, 4980, 5), val=SplitFacts(7_300, 20, 20), test=SplitFacts(36_500, 100, 100)),
        ),
    ),
    "inat18": KnownDataSet(
        "iNaturalist 2018",
        "https://github.com/visipedia/inat_comp/tree/master/2018",
        "inat",
        recipe="inat18_resnet50",
        # no test list: its labels are not public, so the field reports the validation images
        lists=Lists("iNaturalist18", 8142, dict(train=SplitFacts(437_513, 1000, 2), val=SplitFacts(24_426, 3, 3))),
    ),
}
BALANCED = tuple(name for name, known in KNOWN.items() if known.balanced)
EMBEDDED = tuple(name for name, known in KNOWN.items() if known.embedded)
LISTED = tuple(name for name, known in KNOWN.items() if known.lists)
NAMES_HELP = ", ".join(f"{name} (embedded)" if name in EMBEDDED else name for name in KNOWN)
NAMES_HELP += ", a Hub id owner/name, or a local path"


def default_profile(dataset: str) -> str:
    """The default long-tailed profile: "exp" for balanced sets, else "none"."""
    return "exp" if dataset in BALANCED else "none"


def lists_of(dataset: str) -> Lists | None:
    """The published lists of a data set, if it has some."""
    return KNOWN[dataset].lists if dataset in KNOWN else None

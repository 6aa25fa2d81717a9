"""Long-tailed subsets of balanced data sets, as selected by Cao et al.

Exponential and step imbalance as in arXiv:1906.07413 (LDAM), whose selection arXiv:2010.01809 (RIDE) adopted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count, islice
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError

IMBALANCE_TYPES = ("exp", "step", "none")
IMB_FACTOR = 0.01


def check_imbalance(imb_type: str, imb_factor: float, seed: int = 0) -> None:
    """Raise `InputError` for an unknown type, a factor or seed out of range.

    The factor is in (0, 1], the seed in [0, 2**32).
    """
    if imb_type not in IMBALANCE_TYPES:
        raise InputError(f"unknown imbalance type {imb_type!r}; choose one of {', '.join(IMBALANCE_TYPES)}")
    if isinstance(imb_factor, bool) or not isinstance(imb_factor, Real) or not 0 < imb_factor <= 1:
        hint = ""
        if isinstance(imb_factor, Real) and 1 < imb_factor < math.inf:
            hint = f"; papers write IF {imb_factor:g} for the factor {1 / imb_factor:g}"
        raise InputError(
            f"imbalance factor {imb_factor!r} is outside (0, 1]: it is the smallest class over the largest{hint}"
        )
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise InputError(f"split seed {seed!r} is not an integer in [0, 2**32)")


def class_sizes(num_images: int, num_classes: int, imb_type: str, imb_factor: float) -> list[int]:
    """Images to select per class, largest first, from a balanced set of `num_images`.

    With n_max = num_images / num_classes, "exp" selects int(n_max * f^(c / (C - 1))) and "step" n_max of the first half
    of the classes and int(n_max * f) of the others. For an odd C the authors' step omits the last class; here, the
    middle class belongs to the tail. "none" selects n_max everywhere. Sizes are truncated, as by the authors.

    Raises `InputError` for settings out of range and if a class would have no image.
    """
    check_imbalance(imb_type, imb_factor)
    if num_classes < 1 or num_images < 1:
        raise InputError(f"cannot split {num_images} images into {num_classes} classes")
    n_max = num_images / num_classes
    if imb_type == "exp":
        last = max(num_classes - 1.0, 1.0)  # a single class has nothing to decay to
        sizes = [int(n_max * imb_factor ** (c / last)) for c in range(num_classes)]
    elif imb_type == "step":
        head = num_classes // 2 if num_classes > 1 else 1
        sizes = [int(n_max)] * head + [int(n_max * imb_factor)] * (num_classes - head)
    else:
        sizes = [int(n_max)] * num_classes
    if min(sizes) < 1:
        way_out = "use more images"
        if n_max >= 1:
            digits = 1 + math.ceil(math.log10(n_max))
            way_out = f"use a factor of at least {math.ceil(10**digits / n_max) / 10**digits:g}, or more images"
        raise InputError(
            f"imbalance factor {imb_factor:g} leaves no image for {sizes.count(0)} of {num_classes} classes "
            f"({n_max:g} images a class on average); {way_out}, or take the data as they are: imb_type none"
        )
    return sizes


def check_labels(
    labels: ArrayLike, num_classes: int | None = None, names: Sequence[str] | None = None
) -> tuple[np.ndarray, int]:
    """Labels [N] as int64, and the number of classes, each with an image.

    `num_classes` defaults to the highest label plus one; names: of the classes, for the error. Raises `InputError` for
    no labels, labels that are not integers or outside 0 ... C-1, and classes without an image.
    """
    labels = np.asarray(labels)
    if labels.size == 0:
        raise InputError("the data set has zero images")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be one integer an image, not {labels.dtype} of shape {labels.shape}")
    highest = int(labels.max())
    if num_classes is None:
        num_classes = highest + 1
    if labels.min() < 0 or highest >= num_classes:
        row = int(np.argmax((labels < 0) | (labels >= num_classes)))
        raise InputError(f"label {labels[row]} at row {row} is outside 0 … {num_classes - 1}")
    present = np.unique(labels)
    num_missing = num_classes - len(present)
    if num_missing:
        # by iteration: one stray label of a billion must not allocate a billion entries
        have = set(present.tolist())
        missing = islice((c for c in count() if c not in have), min(num_missing, 10))
        first = ", ".join(str(c if names is None else names[c]) for c in missing)
        more = ", …" if num_missing > 10 else ""
        way = "number classes without gaps" if names is None else "add images of them, or remove them from all splits"
        raise InputError(f"{num_missing} of {num_classes} classes have no image: {first}{more}; {way}")
    return labels.astype(np.int64), num_classes


def longtail_indices(
    labels: ArrayLike, imb_type: str, imb_factor: float, seed: int = 0, num_classes: int | None = None
) -> np.ndarray:
    """Rows of the long-tailed subset, int64 [n], grouped by class in ascending order.

    One legacy NumPy generator serves all classes in turn: the ascending rows of a class are shuffled and the first
    `class_sizes` of them selected, so the rows equal the authors' for the same order of labels. A class with fewer
    images keeps them all. "none" returns all rows in their original order.

    labels [N]: integers in 0 ... C-1, every class present; else `InputError`, see `check_labels`.
    """
    check_imbalance(imb_type, imb_factor, seed)
    labels, num_classes = check_labels(labels, num_classes)
    if imb_type == "none":
        return np.arange(len(labels), dtype=np.int64)
    sizes = class_sizes(len(labels), num_classes, imb_type, imb_factor)
    rng = np.random.RandomState(seed)
    by_class = np.argsort(labels, kind="stable")
    bounds = np.cumsum(np.bincount(labels, minlength=num_classes))[:-1]
    kept = []
    for rows, size in zip(np.split(by_class, bounds), sizes, strict=True):
        rng.shuffle(rows)  # in place, and the complete class, whatever its size
        kept.append(rows[:size])
    return np.concatenate(kept).astype(np.int64)

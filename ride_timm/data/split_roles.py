"""Choose the training, test and validation split of a data set by their names."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import InputError, listed
from .folders import split_of


def training_split(splits: Iterable[str], train_split: str) -> str:
    """The split of this name; by "train", also one that stands for it, or the only one; else `InputError`."""
    splits = list(splits)
    train = _named(splits, train_split)
    if train is None and train_split == "train":
        train = splits[0] if len(splits) == 1 and split_of(splits[0]) is None else _of_kind(splits, "train")
    if train is None:
        raise InputError(f"the data set has no split {train_split!r}; it has {listed(splits)}")
    return train


def split_roles(
    splits: Iterable[str], train_split: str, test_split: str | None, use_val: bool | None
) -> dict[str, str]:
    """The splits by role: "train", "test" unless there is none, and "val" if requested."""
    splits = list(splits)
    train = training_split(splits, train_split)
    others = [name for name in splits if name != train]
    if test_split is None:
        test = _of_kind(others, "test") or _of_kind(others, "validation")
        if test is None and others:
            raise InputError(
                f"the data set has no split test or validation; pass --test-split, one of {listed(others)}"
            )
    else:
        test = _named(splits, test_split)
        if test is None:
            raise InputError(f"the data set has no split {test_split!r}; it has {listed(splits)}")
        if test == train:
            raise InputError(f"split {test!r} cannot be both the training and the test set")
    roles = dict(train=train) if test is None else dict(train=train, test=test)
    if use_val is False:
        return roles
    val = _of_kind([name for name in others if name != test], "validation")
    if val is None:
        if use_val is None:
            return roles
        used = " and ".join(repr(name) for name in roles.values())
        raise InputError(
            f"the data set has no validation split besides {used}; it has {listed(splits)}: hold out training images "
            "instead (--holdout 0.1)"
        )
    return roles | dict(val=val)


def _named(splits: list[str], wanted: str) -> str | None:
    """The split of this name, else of this name in another case."""
    return next((name for same in (str, str.lower) for name in splits if same(name) == same(wanted)), None)


def _of_kind(splits: list[str], kind: str) -> str | None:
    """The split of this name, else the first whose name stands for it."""
    return _named(splits, kind) or next((name for name in splits if split_of(name) == kind), None)

"""Classes of a model and of data, matched by their names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from ..errors import InputError, listed


def class_order(names: Sequence[str], own: Sequence[str], spec: str) -> list[int]:
    """The data's class for each class of a model, in the model's order.

    names: of the model's classes; own: of the data's, as many; spec: the model, for messages. Names that differ in
    capitals and signs such as / are the same. Where all differ, or are mere numbers, classes are matched by number,
    with a warning if both have names. Raises `InputError` where only some are the same and have other numbers.
    """
    numbers = list(range(len(own)))
    if list(map(str, numbers)) in (list(names), list(own)):  # mere numbers name nothing
        return numbers
    keys, own_keys = map(_spelled_alike, (names, own))
    if len(set(own_keys)) < len(own):
        keys, own_keys = list(names), list(own)
    if sorted(keys) == sorted(own_keys):
        return [own_keys.index(key) for key in keys]
    moved = next((i for i, key in enumerate(own_keys) if key in keys and keys[i] != key), None)
    if moved is not None:
        raise InputError(
            f"class {own[moved]!r} is number {keys.index(own_keys[moved])} of {spec} and {moved} of the data, which "
            f"have other names as well: name the classes of the data as the model does ({listed(map(repr, names))})."
        )
    one, other = next((names[i], own[i]) for i, key in enumerate(keys) if own_keys[i] != key)
    warnings.warn(
        f"classes are matched by their numbers: {spec} and the data name them differently, such as {one!r} and "
        f"{other!r}",
        stacklevel=2,
    )
    return numbers


def _spelled_alike(names: Sequence[str]) -> list[str]:
    """The names without what folders may spell differently: capitals, and signs such as /."""
    return [re.sub(r"[\W_]+", " ", name).strip().casefold() for name in names]

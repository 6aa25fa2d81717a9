"""Typed, range-checked dataclass fields, for recipes, flags and losses."""

import math
from dataclasses import Field, field
from decimal import Decimal
from types import NoneType
from typing import Any, get_args, get_origin

from .errors import InputError

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    in_epochs: bool = False,
    by_data: bool = False,
) -> Any:
    """Dataclass field with a default, a help text, and its range or choices.

    in_epochs: points in training, which scale with its length; by_data: None leaves the value to the data set.
    """
    meta = dict(help=help, low=low, high=high, above=above, choices=choices, in_epochs=in_epochs, by_data=by_data)
    return field(default=default, metadata=meta)


def kind_of(item: Field) -> type:
    """Type of a value: float for `float`, `float | None`, `tuple[float, ...]`."""
    return (*get_args(item.type), item.type)[0]


def is_tuple(item: Field) -> bool:
    """True for a key with any number of values."""
    return get_origin(item.type) is tuple


def coerce(item: Field, value: Any) -> Any:
    """Convert a value, or its text, to the type of a key; InputError out of range."""
    given, kind, optional = f"{item.name}={value!r}", kind_of(item), NoneType in get_args(item.type)
    choices = item.metadata["choices"]
    is_none = isinstance(value, str) and value.lower() == "none" and "none" not in choices
    if value is None or (optional and is_none):
        if optional:
            return None
        raise InputError(f"{given}: expected a value.")
    if is_tuple(item):
        return tuple(_number(item, v, given) for v in (value if isinstance(value, list | tuple) else [value]))
    if kind is bool:
        value = _BOOLEANS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise InputError(f"{given}: expected true or false.")
        return value
    if kind is not str:
        return _number(item, value, given)
    if not isinstance(value, str):
        raise InputError(f"{given}: expected a string.")
    if choices and value not in choices:
        raise InputError(f"{given}: expected one of {', '.join(choices)}.")
    return value


def _number(item: Field, value: Any, given: str) -> int | float:
    kind, meta = kind_of(item), item.metadata
    noun = "a whole number" if kind is int else "a number"
    try:
        exact = Decimal(value)  # a float would round whole numbers above 2**53
        if isinstance(value, bool) or not math.isfinite(exact) or (kind is int and exact != exact.to_integral_value()):
            raise ValueError
    except (TypeError, ValueError, ArithmeticError):
        raise InputError(f"{given}: expected {noun}.") from None
    number = kind(exact)
    low, high, above = meta["low"], meta["high"], meta["above"]
    bounds = [f"above {above:g}"] if above is not None else []
    bounds += [f"{low:g} or more"] if low is not None else []
    bounds += [f"at most {high:.16g}"] if high is not None else []
    if (
        (above is not None and number <= above)
        or (low is not None and number < low)
        or (high is not None and number > high)
    ):
        raise InputError(f"{given}: expected {noun}, {' and '.join(bounds)} ({meta['help']}).")
    return number

"""What a key of a recipe is: a text, a type and a range, and a value brought to them."""

from __future__ import annotations

import math
from dataclasses import Field, field
from typing import Any, get_args, get_origin

from .errors import InputError


def key(group: str, help: str, default: Any = None, low: float | None = None, high: float | None = None,
        above: float | None = None, choices: tuple = ()) -> Any:  # fmt: skip
    """A recipe key: its group and text in --help, its default, and what values it takes."""
    return field(
        default=default, metadata=dict(group=group, help=help, low=low, high=high, above=above, choices=choices)
    )


def coerce(item: Field, hint: Any, value: Any) -> Any:
    """The value of a key in its type (hint) and range, from YAML or from the command line's text; else InputError."""
    kinds = get_args(hint) or (hint,)
    flag = f"{item.name}={value!r}"
    if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in kinds):
        if type(None) in kinds:
            return None
        raise InputError(f"{flag}: a value is needed.")
    meta = item.metadata
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_number(kinds[0], v, flag, meta) for v in values)
    if bool in kinds:
        if not isinstance(value, bool):
            raise InputError(f"{flag}: expected true or false.")
        return value
    for kind in (int, float):
        if kind in kinds:
            return _number(kind, value, flag, meta)
    if not isinstance(value, str):
        raise InputError(f"{flag}: expected a text.")
    if meta["choices"] and value not in meta["choices"]:
        raise InputError(f"{flag}: expected one of {', '.join(meta['choices'])}.")
    return value


def _number(kind: type, value: Any, flag: str, meta: Any) -> int | float:
    noun = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"{flag}: expected {noun}.") from None
    bounds = [f"above {meta['above']:g}"] if meta["above"] is not None else []
    bounds += [f"{meta['low']:g} or more"] if meta["low"] is not None else []
    bounds += [f"at most {meta['high']:.16g}"] if meta["high"] is not None else []
    inside = (
        (meta["above"] is None or number > meta["above"])
        and (meta["low"] is None or number >= meta["low"])
        and (meta["high"] is None or number <= meta["high"])
    )
    if not inside:
        raise InputError(f"{flag}: expected {noun}, {' and '.join(bounds)}; it is: {meta['help']}.")
    return kind(number)

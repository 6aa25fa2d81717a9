"""Command-line flags of the recipe keys."""

import argparse
from collections.abc import Collection
from dataclasses import Field, fields
from typing import Any, NoReturn

from ..errors import InputError
from ..keys import is_tuple, kind_of
from .recipe import Recipe
from .recipe_keys import GROUPS

_METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """argparse.ArgumentParser that raises InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def keys_of(group: str) -> list[str]:
    """Names of the recipe keys of a group."""
    return [item.name for item in fields(GROUPS[group])]


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Add a flag for each recipe key, or for these.

    Absent flags stay out of the parsed namespace.
    """
    for group, keys in GROUPS.items():
        items = [item for item in fields(keys) if names is None or item.name in names]
        section = parser.add_argument_group(group, keys.__doc__) if items else parser
        for item in items:
            flag = "--" + item.name.replace("_", "-")
            section.add_argument(flag, dest=item.name, default=argparse.SUPPRESS, **_options(item))


def _options(item: Field) -> dict[str, Any]:
    help, kind = item.metadata["help"], kind_of(item)
    if kind is bool:
        return dict(help=help, action=argparse.BooleanOptionalAction)
    choices = item.metadata["choices"]
    metavar = "{" + ",".join(choices) + "}" if choices else _METAVARS[kind]
    return dict(help=help, metavar=metavar, **(dict(nargs="*") if is_tuple(item) else {}))


def flags_given(args: argparse.Namespace) -> dict[str, Any]:
    """Recipe keys that were given on the command line."""
    known = {item.name for item in fields(Recipe)}
    return {name: value for name, value in vars(args).items() if name in known}

"""Command-line flags of the recipe keys."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any, NoReturn

from ..errors import InputError
from .recipe import Recipe


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `InputError`s like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def keys_of(group: str) -> list[str]:
    """Names of the recipe keys of a group."""
    return [item.name for item in dataclasses.fields(Recipe) if item.metadata["group"] == group]


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """A flag for every recipe key, or for these; absent flags stay out of the parsed namespace."""
    groups: dict[str, Any] = {}
    for item in dataclasses.fields(Recipe):
        if names is not None and item.name not in names:
            continue
        group = item.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        options: dict[str, Any] = dict(dest=item.name, default=argparse.SUPPRESS, help=item.metadata["help"])
        if item.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif item.type.startswith("tuple["):
            options.update(nargs="*", metavar="N" if "int" in item.type else "X")
        elif item.metadata["choices"]:
            options["metavar"] = "{" + ",".join(item.metadata["choices"]) + "}"
        else:
            options["metavar"] = {"i": "N", "f": "X", "s": "TEXT"}[item.type[0]]
        groups[group].add_argument("--" + item.name.replace("_", "-"), **options)


def flags_given(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe keys that were given on the command line."""
    known = {item.name for item in dataclasses.fields(Recipe)}
    return {name: value for name, value in vars(args).items() if name in known}

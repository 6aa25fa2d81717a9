"""YAML whose scalars stay text: the type of a key decides the value."""

from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..errors import InputError

_NULLS = ("", "~", "null", "Null", "NULL")


class _TextLoader(yaml.BaseLoader):
    """YAML 1.1 would read `no` as False, 010 as 8, 1:30 as 90 and 1e-3 as a string."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # nested, they grow without bound
            raise ConstructorError(None, None, "aliases are not for recipes", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in ("str", "seq", "map"):
            raise ConstructorError(None, None, f"tag !!{tag} is not for recipes", node.start_mark)
        return super().construct_object(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        return None if node.style is None and text in _NULLS else text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise ConstructorError(None, None, f"key {key} is given twice", key_node.start_mark)
            seen.add(key)
        return values


def read_yaml(data: bytes, name: str) -> dict[Any, Any]:
    """Read a YAML mapping; InputError for other YAML, naming the recipe.

    Values are text, None, or lists and mappings of them.
    """
    if b"\0" in data:
        raise InputError(f"recipe {name} is UTF-16 text: save it as UTF-8.")
    try:
        values = yaml.load(data.decode("utf-8-sig"), Loader=_TextLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {name} is not UTF-8 text.") from error
    except RecursionError as error:
        raise InputError(f"recipe {name} is nested too deeply: expected `key: value` lines.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"recipe {name} is not valid YAML: {line}{problem or str(error).splitlines()[0]}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"recipe {name}: expected `key: value` lines.")
    return values

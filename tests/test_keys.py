"""Values of recipe keys, whatever the recipe."""

import dataclasses
from dataclasses import dataclass
from typing import get_type_hints

import pytest

from ride_timm import InputError
from ride_timm.keys import coerce, key


@dataclass
class Keys:
    count: int = key("run", "how many", 1, low=1, high=9)
    rate: float | None = key("run", "how fast", above=0)
    sides: tuple[int, ...] = key("run", "how large", (), low=8)
    taus: tuple[float, ...] = key("run", "how strong", ())
    on: bool = key("run", "whether", False)
    way: str = key("run", "which", "up", choices=("up", "down"))
    place: str | None = key("run", "where")


def value_of(name, value):
    item = next(item for item in dataclasses.fields(Keys) if item.name == name)
    return coerce(item, get_type_hints(Keys)[name], value)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("rate", "1e-3", 0.001),
        ("rate", "None", None),
        ("rate", None, None),
        ("sides", [16, "24"], (16, 24)),
        ("sides", "16", (16,)),
        ("sides", (), ()),
        ("taus", [0, "1.5"], (0.0, 1.5)),
        ("on", True, True),
        ("way", "down", "down"),
        ("place", "none", None),
        ("place", "here", "here"),
    ],
)
def test_values_in_their_type(name, given, value):
    brought = value_of(name, given)
    assert brought == value and type(brought) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("count", "2.5", "count='2.5': expected a whole number."),
        ("count", True, "count=True: expected a whole number."),
        ("count", 0, "count=0: expected a whole number, 1 or more and at most 9; it is: how many."),
        ("count", None, "count=None: a value is needed."),
        ("rate", 0, "rate=0: expected a number, above 0; it is: how fast."),
        ("rate", "nan", "rate='nan': expected a number."),
        ("sides", [16, 4], "sides=[16, 4]: expected a whole number, 8 or more; it is: how large."),
        ("taus", ["x"], "taus=['x']: expected a number."),
        ("on", "yes", "on='yes': expected true or false."),
        ("way", "left", "way='left': expected one of up, down."),
        ("place", 3, "place=3: expected a text."),
    ],
)
def test_other_values_are_named(name, given, message):
    with pytest.raises(InputError) as error:
        value_of(name, given)
    assert str(error.value) == message

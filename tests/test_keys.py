"""Values of keys: from Python, from YAML and from the command line."""

from dataclasses import dataclass, fields

import pytest

from ride_timm import InputError
from ride_timm.keys import coerce, key


@dataclass
class Keys:
    count: int = key(1, "how many", low=1, high=9)
    seed: int = key(0, "seed", low=0, high=2**53)
    rate: float | None = key(None, "how fast", above=0)
    sizes: tuple[int, ...] = key((), "how large", low=8)
    taus: tuple[float, ...] = key((), "how strong")
    on: bool = key(False, "on or off")
    way: str = key("up", "which", choices=("up", "down", "no"))
    path: str | None = key(None, "file")


def value_of(name, value):
    return coerce(next(item for item in fields(Keys) if item.name == name), value)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("count", "3.0", 3),
        ("seed", "010", 10),
        ("seed", "1_000", 1000),
        ("seed", "1e3", 1000),
        ("seed", "9007199254740992", 2**53),
        ("rate", "1e-3", 0.001),
        ("rate", "5.0e-04", 0.0005),
        ("rate", ".1", 0.1),
        ("rate", 2, 2.0),
        ("rate", "None", None),
        ("rate", None, None),
        ("sizes", [16, "24"], (16, 24)),
        ("sizes", "16", (16,)),
        ("sizes", (), ()),
        ("taus", [0, "1.5"], (0.0, 1.5)),
        ("on", True, True),
        *(("on", text, True) for text in ("true", "True", "yes", "on", "ON")),
        *(("on", text, False) for text in ("false", "FALSE", "no", "No", "off")),
        ("way", "down", "down"),
        ("way", "no", "no"),
        ("path", "none", None),
        ("path", "here", "here"),
        ("path", "2024-01-01", "2024-01-01"),
    ],
)
def test_values_in_their_type(name, given, value):
    converted = value_of(name, given)
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("count", "2.5", "count='2.5': expected a whole number."),
        ("count", True, "count=True: expected a whole number."),
        ("count", 0, "count=0: expected a whole number, 1 or more and at most 9 (how many)."),
        ("count", None, "count=None: expected a value."),
        ("count", [1], "count=[1]: expected a whole number."),
        ("count", "1:30", "count='1:30': expected a whole number."),
        ("count", "0x3", "count='0x3': expected a whole number."),
        ("count", "2024-01-01", "count='2024-01-01': expected a whole number."),
        ("seed", "9007199254740993", "seed='9007199254740993': expected a whole number, 0 or more and at most "
                                     "9007199254740992 (seed)."),
        ("seed", "1e999999999", "seed='1e999999999': expected a whole number."),
        ("rate", 0, "rate=0: expected a number, above 0 (how fast)."),
        ("rate", "nan", "rate='nan': expected a number."),
        ("rate", "1e400", "rate='1e400': expected a number."),
        ("rate", "1,5", "rate='1,5': expected a number."),
        ("rate", {"a": "b"}, "rate={'a': 'b'}: expected a number."),
        ("sizes", [16, 4], "sizes=[16, 4]: expected a whole number, 8 or more (how large)."),
        ("sizes", [None], "sizes=[None]: expected a whole number."),
        ("taus", ["x"], "taus=['x']: expected a number."),
        ("on", "1", "on='1': expected true or false."),
        ("on", 1, "on=1: expected true or false."),
        ("on", ["yes"], "on=['yes']: expected true or false."),
        ("way", "left", "way='left': expected one of up, down, no."),
        ("way", False, "way=False: expected a string."),
        ("path", 3, "path=3: expected a string."),
    ],
)  # fmt: skip
def test_other_values_are_named(name, given, message):
    with pytest.raises(InputError) as error:
        value_of(name, given)
    assert str(error.value) == message

"""The two ways a run can end badly. Both carry one plain sentence for the user; what caused them is chained."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_SAYS_NOTHING = re.compile(r"(An error occurred while generating the dataset)?")


class InputError(ValueError):
    """Something the user gave cannot be used; found before any long work starts. The script exits with 2."""


class RunError(RuntimeError):
    """Something failed while the run was under way, such as an image that cannot be read. The script exits with 1."""


def listed(names: Iterable[object]) -> str:
    """The names in one line, the first ten of them and the number of all where there are more."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:10]) + (f", … ({len(texts)} in all)" if len(texts) > 10 else "")


def first_line(error: Exception) -> str:
    """Kind and first line of an error from elsewhere, without addresses of objects.

    One without a text of its own, as `datasets` raises, gives way to its cause.
    """
    while isinstance(error.__cause__, Exception) and _SAYS_NOTHING.fullmatch(str(error).strip()):
        error = error.__cause__
    text = str(error).strip().partition("\n")[0]
    text = re.sub(r" <[\w.]+ object at 0x\w+>", "", text)[:200].rstrip(".")  # an address is of no use
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Suppress what a library logs, such as its retries; the final error says it once."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)

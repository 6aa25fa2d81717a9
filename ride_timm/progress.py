"""Progress bars."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm's progress bar, drawn twice a second on a terminal and every 30 s into a log."""
    return tqdm(*args, mininterval=0.5 if sys.stderr.isatty() else 30, **kwargs)


def line_end() -> str:
    """A line end where a bar is drawn, for a line that follows it from another thread; else nothing."""
    return "\n" if getattr(tqdm, "_instances", None) else ""

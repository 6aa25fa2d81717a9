"""What a command owes whoever launched it: threads, signals, one clear error line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InputError, RunError


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the number is its first argument, how to go on may be its second."""


class Signals:
    """Remembers SIGINT and SIGTERM until the loop asks: nothing is torn in the middle of a step or of a write."""

    def __init__(self) -> None:
        self.caught: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = number

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.caught is not None:
            raise Interrupted(self.caught)


def exit_code(command: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Run a command: 0 done, 2 bad input, 1 failed in the run, 128 + signal interrupted; one line on stderr.

    A reader that has seen enough, like `head`, is no failure to speak of: 141, which is what SIGPIPE makes of others.
    """
    try:
        code = _outcome(command, argv)
        print(end="", flush=True)  # the reader's absence is found here, not when the interpreter ends
        return code
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed
            return 141
        raise  # another pipe's, such as a tracker's


def _outcome(command: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    try:
        command(argv)
        return 0
    except SystemExit as done:  # after --help and the like
        return int(done.code or 0)
    except Interrupted as error:
        code, *more = error.args
        code, message = 128 + code, more[0] if more else "interrupted; --resume goes on after the last finished epoch."
    except KeyboardInterrupt:
        code, message = 130, "interrupted."
    except InputError as error:
        code, message = 2, str(error)
    except RunError as error:
        code, message = 1, str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        code, message = 1, f"out of memory: try a smaller --batch-size ({error})"
    # a machine's processes find the same bad input and one says so; another machine's may be right
    if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return code

"""Process setup of the commands: signal handling, exit codes, JSON on stdout."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, RunError, first_line

# errors for which torch has no class of their own: a part of their text, and what has happened
_DEATHS = {
    "DataLoader worker (pid": "a loader process died, perhaps for want of memory: try fewer --workers, or a smaller "
    "--batch-size",
    "can't allocate memory": "out of memory: try a smaller --batch-size",
    "MPS backend out of memory": "out of memory: try a smaller --batch-size",
    "busy or unavailable": "another process has the GPU for itself: wait for it, or choose another GPU by "
    "CUDA_VISIBLE_DEVICES",
    "gloo/transport": "another process of this run has died; --resume continues after the last finished epoch",
}
_LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}  # torchrun and `accelerate launch` set one or both
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; its first argument is the signal's number."""


class Signals:
    """Defer SIGINT and SIGTERM to the next `check`, never within a step or a write."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Hand signals back to those who handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        self.caught = number

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.caught is not None:
            raise Interrupted(self.caught)


def end_with_parent() -> None:
    """On Linux, have SIGTERM sent to this process when its parent has ended, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_main_process() -> bool:
    """True in the first process of a launch, also before Accelerate knows of it."""
    return os.environ.get("RANK", "0") == "0"


def _format_warning(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """One line for a warning of this package; that of others as Python has it, with its file."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {message}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else ""
    return _with_file(message, category, filename, lineno, line)


_with_file = warnings.formatwarning


def exit_code(command: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Run a command and return its exit code, with one line on stderr for an error.

    0 done, 2 bad input, 1 failed during the run, 128 + signal interrupted.
    A closed pipe (`| head`) exits with 141, as SIGPIPE would. A command that a launcher started ends with it.
    """
    if _LAUNCHED & os.environ.keys():  # not that of a shell, which `nohup` outlives
        end_with_parent()
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe on Windows is not UTF-8, and class names are in any script
    try:
        code = _run(command, argv)
        print(end="", flush=True)  # finds a closed pipe here rather than at interpreter exit
        return code
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno != errno.EINVAL:  # a closed pipe on Windows
            raise
        try:
            print(flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed
            return 141
        raise  # the pipe was not stdout but, say, a tracker's


def _interrupted(number: int) -> tuple[int, str]:
    return 128 + number, "interrupted; --resume continues after the last finished epoch."


def _caught() -> int | None:
    """The signal that the `Signals` in force have caught."""
    signals = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return signals.caught if isinstance(signals, Signals) else None


def _run(command: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    try:
        command(argv)
        return 0
    except SystemExit as done:  # after --help and the like
        return int(done.code or 0)
    except Interrupted as error:
        code, message = _interrupted(error.args[0])
    except KeyboardInterrupt:
        code, message = 130, "interrupted."
    except InputError as error:
        code, message = 2, str(error)
    except RunError as error:
        code, message = 1, str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        code, message = 1, f"out of memory: try a smaller --batch-size ({first_line(error)})"
    except OSError as error:
        if error.filename is None:
            raise
        code, message = 1, f"{os.fsdecode(error.filename)}: {error.strerror}"
    except RuntimeError as error:
        what = next((what for text, what in _DEATHS.items() if text in str(error)), None)
        if what is None:
            raise
        code, message = 1, f"{what} ({first_line(error)})"
        if number := _caught():  # a signal to all processes ends workers before the next check
            code, message = _interrupted(number)
    # all processes of a machine find the same bad input: one prints it; another machine may find none
    if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_files(folder: Path, as_json: bool) -> None:
    """The files of a folder that a command has written, with their sizes."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if as_json:
        return print_json(dict(folder=str(folder), files=files))
    for name, num_bytes in files.items():
        print(f"{folder / name}  {num_bytes:,} bytes")

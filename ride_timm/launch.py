"""What a command owes whoever launched it: threads, signals, one clear error line and an exit code."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .errors import InputError, RunError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `InputError`s like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


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


def set_threads(requested: int | None) -> None:
    """Share all cores among this machine's processes, unless told otherwise.

    A plain `accelerate launch` sets OMP_NUM_THREADS=1, which halves the speed of two cores; any other value stands.
    """
    if requested is not None and requested < 1:
        raise InputError(f"threads={requested}: expected 1 or more.")
    if requested is None and os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(requested or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def keep_memory() -> None:
    """Let glibc keep the memory that tensors free, for the next step's tensors of the same sizes.

    By default it hands large blocks back to the system, and each step pays for new pages again (a tenth of a CIFAR
    step on 2 cores, a seventh of a ResNeXt-50's pass over 256 images that stop after one expert). The process holds
    what it once needed until it ends. Without glibc, or where its settings stand in the environment, nothing
    changes.
    """
    chosen = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in chosen):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        # No limits: any number is one of at most 2 GiB, which the maps of a large batch exceed, and before glibc 2.35
        # blocks above 32 MiB can be had from the heap only if none at all are mapped.
        for setting, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 2**26)):
            mallopt(setting, value)


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler and Python's headers, which it needs on a CPU."""
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return False
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler  # CXX, or one name by platform: whichever it will run

        return bool(get_cpp_compiler())
    except (RuntimeError, OSError, ImportError):  # torch's own, and private: another release may not have it
        return False


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

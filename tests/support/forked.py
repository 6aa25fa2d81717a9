"""Python in forks of one process that has imported the libraries, which takes longer than most tests."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    _CONTEXT.set_forkserver_preload(["accelerate", "timm", "pytest"])


def _run(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class Python:
    """`python FILE …` or `python -c CODE …`, started, with more environment variables; its output goes to files."""

    def __init__(self, *arguments, **environment):
        self._folder = tempfile.TemporaryDirectory()
        Path(self._folder.name, "stdout").touch()
        Path(self._folder.name, "stderr").touch()
        args = ([str(argument) for argument in arguments], os.environ | environment, self._folder.name)
        self._process = _CONTEXT.Process(target=_run, args=args)
        self._process.start()
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return Path(self._folder.name, "stdout").read_text()

    @property
    def stderr(self) -> str:
        return Path(self._folder.name, "stderr").read_text()

    def wait(self, seconds: float = 120) -> int:
        """Exit code, once it has ended; it is killed if it does not."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def run_python(*arguments, **environment) -> Python:
    """Run it to its end."""
    process = Python(*arguments, **environment)
    process.wait()
    return process

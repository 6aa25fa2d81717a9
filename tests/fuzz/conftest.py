"""Random input: a few of each kind in the suite, always the same ones; more by `--hypothesis-profile long`."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("long", settings.get_profile("suite"), max_examples=5000, derandomize=False)
settings.load_profile("suite")

_STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
)
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree")
_watched: list[tuple[Path, list[str]]] = []


class TooSlow(BaseException):
    """An input took more than 10 s; not an Exception, which the code under test may turn into an answer."""


def _audit(event, args):
    if not _watched:
        return
    root, found = _watched[-1]
    if event in _STARTS:
        found.append(f"{event}{args}")
    elif event in _WRITES or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        paths = [arg for arg in args[:2] if isinstance(arg, str | bytes | os.PathLike)]
        if event == "open":
            paths = paths[:1]
        found.extend(f"{event} {path}" for path in paths if not _inside(os.fsdecode(path), root))


def _inside(path, root):
    return path == os.devnull or Path(path).absolute().is_relative_to(root)


@pytest.fixture(scope="session")
def harmless(tmp_path_factory):
    """Context that ends after 10 s, and fails where a process is started or a file outside a folder is changed."""
    sys.addaudithook(_audit)

    @contextmanager
    def watched(root=None):
        def too_slow(*_):
            raise TooSlow

        found: list[str] = []
        before = signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(10)
        _watched.append((tmp_path_factory.getbasetemp() if root is None else root, found))
        try:
            yield
        finally:
            _watched.pop()
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert not found, found

    return watched

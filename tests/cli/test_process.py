"""Exit codes and signals."""

import errno
import io
import os
import re
import signal
import sys
import time
import warnings

import pytest
import torch
from forked import Python
from torch.utils.data import DataLoader

from ride_timm import InputError, RunError
from ride_timm.cli import process
from ride_timm.cli.process import Interrupted, Signals, exit_code
from ride_timm.training.arguments import Parser


def _raise(error):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad\n  thing"), 2),
        (RunError("broke"), 1),
        (MemoryError(), 1),
        (OSError(36, "File name too long", b"x" * 300), 1),
        (PermissionError(13, "Permission denied", "cache"), 1),
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGTERM), 143),
    ],
)
def test_exit_codes_with_one_line_on_stderr(error, code, capsys):
    assert exit_code(_raise(error), None) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


class _Dies:
    def __len__(self):
        return 2

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGTERM)  # SIGKILL is none of Windows'


def test_a_loader_process_that_is_killed_is_one_line(capsys):
    assert exit_code(lambda argv: list(DataLoader(_Dies(), num_workers=1)), None) == 1
    assert re.fullmatch(r"error: a loader process died.*fewer --workers.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of memory: try a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: try a smaller"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"), "out of memory: try a smaller"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel"), "another process"),
    ],
)
def test_a_machine_that_is_full_or_busy_is_one_line(error, expected, capsys):
    assert exit_code(_raise(error), None) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}") and "more" not in line and "kernel" not in line


def test_other_errors_keep_their_traceback():
    with pytest.raises(OSError, match="of no file"):
        exit_code(_raise(OSError("an error of no file")), None)
    with pytest.raises(RuntimeError, match="a bug"):
        exit_code(_raise(RuntimeError("a bug in DataLoader worker process 0")), None)


@pytest.mark.parametrize(("rank", "expected"), [("0", "warning: look\n"), ("1", "")])
def test_warnings_of_the_package_are_one_line_of_one_process(monkeypatch, rank, expected):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert exit_code(lambda argv: None, None) == 0
    assert warnings.formatwarning("look", UserWarning, process.__file__, 3) == expected
    assert warnings.formatwarning("look", UserWarning, "other.py", 3).startswith("other.py:3: UserWarning: look")


def test_success_is_silent(capsys):
    assert exit_code(lambda argv: None, None) == 0
    assert capsys.readouterr().err == ""


def test_bad_input_is_reported_by_one_process_of_a_machine(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "8")  # the first of a second machine, which has found it alone
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code(_raise(InputError("x")), None) == 2 and capsys.readouterr().err == "error: x\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code(_raise(InputError("x")), None) == 2 and capsys.readouterr().err == ""
    assert exit_code(_raise(RunError("x")), None) == 1 and capsys.readouterr().err != ""


def _print(text):
    return lambda argv: print(text)


def _print_help(argv):
    print("usage")
    raise SystemExit(0)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", [_print("short"), _print("long" * 100_000), _print_help])
def test_a_closed_pipe_exits_with_141(monkeypatch, capsys, command, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    raw = io.FileIO(writing, "w")
    with io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), write_through=unbuffered) as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert exit_code(command, None) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""  # nor at the end, when the file was closed


class _ClosedOnWindows(io.FileIO):
    def write(self, data):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_a_closed_pipe_of_windows_exits_with_141(monkeypatch, tmp_path):
    out = _ClosedOnWindows(tmp_path / "pipe", "w")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, write_through=True))
    assert exit_code(_print("short"), None) == 141


def test_a_broken_pipe_of_others_is_not_hidden():
    with pytest.raises(BrokenPipeError, match="a tracker's"):
        exit_code(_raise(BrokenPipeError("a tracker's")), None)
    with pytest.raises(OSError, match="another's"):
        exit_code(_raise(OSError(errno.EINVAL, "another's")), None)


def test_parser_complaints_are_input_errors():
    with pytest.raises(InputError, match="unrecognized arguments: --nope"):
        Parser().parse_args(["--nope"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_check(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signals = Signals()
    try:
        signals.check()
        signal.raise_signal(number)
        with pytest.raises(Interrupted) as caught:
            signals.check()
        assert caught.value.args == (number,)
    finally:
        signals.restore()
    assert before == {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}


def _killed_with_its_workers(argv):
    Signals()
    signal.raise_signal(signal.SIGTERM)
    raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")


def test_workers_that_a_signal_ended_are_no_lack_of_memory(capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert exit_code(_killed_with_its_workers, None) == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "error: interrupted; --resume continues after the last finished epoch.\n"


def test_a_pipe_that_lacks_characters_gets_others(monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert exit_code(lambda argv: print("bee → ant, é"), None) == 0
    assert pipe.buffer.getvalue().splitlines() == ["bee ? ant, é".encode("cp1252")]


LAUNCHER = """
import os, time
from ride_timm.cli.process import Signals, exit_code

def command(argv):
    signals = Signals()
    print(os.getpid(), flush=True)
    for _ in range(400):
        signals.check()
        time.sleep(0.05)

if os.fork():
    os.wait()
else:
    os._exit(exit_code(command, None))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "NO_LAUNCHER"])
def test_a_process_is_interrupted_when_its_launcher_is_killed_but_outlives_a_shell(variable):
    launcher = Python("-c", LAUNCHER, **{variable: "no"})
    wait_until(lambda: launcher.stdout)
    launcher.kill()
    if variable == "NO_LAUNCHER":
        time.sleep(0.5)
        os.kill(int(launcher.stdout), signal.SIGKILL)
        assert launcher.stderr == ""
    else:
        wait_until(lambda: launcher.stderr)
        assert launcher.stderr.startswith("error: interrupted; --resume continues")


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")

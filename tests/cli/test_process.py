"""Exit codes, signals and threads."""

import io
import os
import platform
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import cpp_builder

from ride_timm import InputError, RunError
from ride_timm.cli import process as launch
from ride_timm.cli.process import Interrupted, Signals, exit_code
from ride_timm.hardware import has_compiler, keep_memory, set_threads
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
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGTERM), 143),
    ],
)
def test_exit_codes_with_one_line_on_stderr(error, code, capsys):
    assert exit_code(_raise(error), None) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


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
def test_a_reader_that_has_seen_enough_is_no_failure_to_speak_of(monkeypatch, capsys, command, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    raw = io.FileIO(writing, "w")
    with io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), write_through=unbuffered) as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert exit_code(command, None) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""  # nor at the end, when the file was closed


def test_a_broken_pipe_of_others_is_not_hidden():
    with pytest.raises(BrokenPipeError, match="a tracker's"):
        exit_code(_raise(BrokenPipeError("a tracker's")), None)


def test_parser_complaints_are_input_errors():
    with pytest.raises(InputError, match="unrecognized arguments: --nope"):
        Parser().parse_args(["--nope"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_check(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        signals = Signals()
        signals.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as caught:
            signals.check()
        assert caught.value.args == (number,)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_threads(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(1)
        set_threads(None)
        assert torch.get_num_threads() == 1  # a value that somebody chose stands
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what a plain accelerate launch sets
        set_threads(None)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        set_threads(None)
        assert torch.get_num_threads() == 1
        set_threads(2)
        assert torch.get_num_threads() == 2
        with pytest.raises(InputError, match="threads=0: expected 1 or more"):
            set_threads(0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "there", "found"),
    [
        ("g++", "g++", True),
        ("g++", "clang++", False),  # torch looks for one name only: CXX, or the platform's
        ("clang++", "clang++", True),
        ("icpx", "g++", False),
        ("g++", None, False),
    ],
)
def test_a_compiler_is_the_one_that_torch_will_run(monkeypatch, tmp_path, name, there, found):
    monkeypatch.setattr(launch.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    if there is not None:
        (tmp_path / there).write_text("#!/bin/sh\n")
        (tmp_path / there).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor.patch({"cpp.cxx": (None, name)}):
        assert has_compiler() == found
        (tmp_path / "Python.h").unlink()
        assert not has_compiler()
    cpp_builder.cpp_compiler_search.cache_clear()


MALLOC_CHOICES = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


@pytest.mark.parametrize("chosen", [None, *MALLOC_CHOICES])
def test_memory_is_kept_unless_its_settings_are_chosen(monkeypatch, chosen):
    settings = {}
    libc = SimpleNamespace(mallopt=settings.__setitem__)  # M_MMAP_MAX -4, M_TRIM_THRESHOLD -1, M_TOP_PAD -2
    for name in MALLOC_CHOICES:
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(chosen, "1")
    monkeypatch.setattr(launch.sys, "platform", "linux")
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: libc)
    keep_memory()
    assert settings == ({} if chosen else {-4: 0, -1: -1, -2: 2**26})


FREED = """
import ctypes, torch
from ride_timm.hardware import keep_memory
end_of_heap = ctypes.CDLL(None).sbrk
end_of_heap.restype = ctypes.c_void_p
keep_memory()
start = end_of_heap(0)
maps = [torch.empty(side * 2**20, dtype=torch.uint8) for side in (1, 64, 1200, 1200)]  # never touched: none is used
held = end_of_heap(0)
assert held - start > 2400 * 2**20, held - start
del maps
assert end_of_heap(0) == held, held - end_of_heap(0)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_more_than_two_gigabytes_of_maps_are_kept():
    env = {name: value for name, value in os.environ.items() if name not in MALLOC_CHOICES}
    subprocess.run([sys.executable, "-c", FREED], env=env, check=True)

"""The device's name, bfloat16, threads, the compiler and the allocator."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import cpp_builder

from ride_timm import InputError, hardware
from ride_timm.hardware import choose_device, has_compiler, keep_memory, set_threads


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_default_device_is_the_gpu(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(cuda))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: bool(mps))
    assert choose_device().type == chosen


@pytest.fixture
def cpuinfo(monkeypatch):
    """Sets what /proc/cpuinfo holds; None: there is none."""

    def put(text):
        def read_text(path):
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(hardware.Path, "read_text", read_text)

    return put


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nmodel name\t: other\n",
            "AMD EPYC, family 26, model 2",
        ),
        ("model name\t: ARMv8 Processor\n", "ARMv8 Processor"),
        ("BogoMIPS\t: 50.00\n", "aarch64"),
        (None, "aarch64"),  # no Linux
    ],
)
def test_the_processor_is_named_with_its_generation(text, name, cpuinfo, monkeypatch):
    cpuinfo(text)
    monkeypatch.setattr(hardware.platform, "processor", lambda: "")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "aarch64")
    assert hardware.processor_name() == name


@pytest.mark.parametrize(("bf16", "pays"), [(0.001, True), (0.004, False)])
def test_bf16_pays_where_its_product_is_faster(bf16, pays, monkeypatch):
    """A clock that only the products move forward."""
    clock, costs = [0.0], {torch.bfloat16: bf16, torch.float32: 0.002}

    def product(a, b):
        clock[0] += costs[a.dtype] * (3 if clock[0] == 0 else 1)  # the first one is slow

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", product)
    assert hardware.bf16_pays() is pays


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_decides_for_itself(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert hardware.bf16_pays() is supported


def test_apples_gpus_have_no_float64_and_train_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert not hardware.bf16_pays() and hardware.double(torch.ones(2)).dtype == torch.float64


def test_threads(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(1)
        set_threads(None)
        assert torch.get_num_threads() == 1  # a value chosen by the user stands
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what a plain accelerate launch sets
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 3}, raising=False)
        set_threads(None)
        assert torch.get_num_threads() == 3
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
    monkeypatch.setattr(hardware.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
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
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: libc)
    keep_memory()
    assert settings == ({} if chosen else {-4: 0, -1: -1, -2: 2**26})


FREED = """
import ctypes, torch
from ride_timm.hardware import keep_memory
end_of_heap = ctypes.CDLL(None).sbrk
end_of_heap.restype = ctypes.c_void_p
keep_memory()
start = end_of_heap(0)
maps = [torch.empty(n * 2**20, dtype=torch.uint8) for n in (1, 64, 1200, 1200)]  # never touched: none is used
held = end_of_heap(0)
assert held - start > 2400 * 2**20, held - start
del maps
assert end_of_heap(0) == held, held - end_of_heap(0)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_more_than_two_gigabytes_are_kept():
    env = {name: value for name, value in os.environ.items() if name not in MALLOC_CHOICES}
    subprocess.run([sys.executable, "-c", FREED], env=env, check=True)

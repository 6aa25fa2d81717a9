"""The machine: device name, bfloat16, CPU threads, allocator, C++ compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path

import torch

from .errors import InputError, first_line


def processor_name() -> str:
    """The CPU's name and, on Linux, family and model, which some names leave out."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]  # the first core
    except OSError:
        first = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{word} {facts[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in facts]
    return ", ".join([name, *numbers])


def choose_device(name: str | None = None) -> torch.device:
    """The device of this name, or the GPU where there is one; InputError for one that is not usable."""
    if name is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise InputError(f"device={name}: not usable here ({first_line(error)}); try cpu.") from error
    return device


def device_name(device: torch.device) -> str:
    """A GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({processor_name()}, {torch.get_num_threads()} threads)"


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting: from pageable memory, a copy would block until the GPU is idle."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def double(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on the CPU where its device has none: Apple's."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def bf16_pays() -> bool:
    """True if bfloat16 is faster: as CUDA states, or in a small product on the CPU; not on Apple's GPUs."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    return _seconds_of_product(torch.bfloat16) < _seconds_of_product(torch.float32)


def _seconds_of_product(dtype: torch.dtype) -> float:
    matrix, seconds = torch.ones(512, 512, dtype=dtype), []
    for _ in range(5):  # the fastest one is undisturbed
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(requested: int | None) -> None:
    """Take the requested CPU threads, else divide all cores among the processes.

    A plain `accelerate launch` sets OMP_NUM_THREADS=1, which halves the speed of two cores; any other value is kept.
    InputError for a number below 1.
    """
    if requested is not None and requested < 1:
        raise InputError(f"threads={requested}: expected 1 or more.")
    if requested is None and os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    torch.set_num_threads(requested or max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def keep_memory() -> None:
    """Let glibc keep the memory that tensors free, for those of the next step.

    By default glibc returns large blocks to the system and every step pays for new pages, a tenth of a CIFAR step on
    2 cores. The process keeps its peak memory until it ends. Nothing changes without glibc, or where the environment
    sets the allocator.
    """
    chosen = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if not sys.platform.startswith("linux") or any(name in os.environ for name in chosen):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        # no limits: they are at most 2 GiB, which feature maps of a large batch exceed, and before glibc 2.35 blocks
        # above 32 MiB come from the heap only if none are mapped
        for setting, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 2**26)):
            mallopt(setting, value)


def has_compiler() -> bool:
    """True if torch.compile finds the C++ compiler and Python.h that a CPU needs."""
    if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return False
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler  # the one it will run: CXX, or the platform's

        return bool(get_cpp_compiler())
    except (RuntimeError, OSError, ImportError):  # torch's own, and private: another release may not have it
        return False

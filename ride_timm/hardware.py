"""What computes: its name, and the arithmetic that pays on it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import sysconfig
from pathlib import Path

import torch

from .errors import InputError


def _cpu_facts() -> dict[str, str]:
    """What Linux tells of the first core, such as "model name" and "flags"; empty on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def processor_name() -> str:
    """The CPU's model and, where Linux tells them, the numbers of its generation, which some names leave out."""
    facts = _cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{word} {facts[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in facts]
    return ", ".join([name, *numbers])


def device_name(device: torch.device) -> str:
    """The processor that computed: a GPU's name, or the CPU's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({processor_name()}, {torch.get_num_threads()} threads)"


def bf16_pays() -> bool:
    """Whether bfloat16 is faster than float32 here: neither imitated, nor an Intel's whose matrix units are hidden.

    Without them (AMX, which some virtual machines hide) an Emerald Rapids multiplies matrices of 2048 in bfloat16 at
    0.55 of float32's rate. Cooper Lake, the one Intel with such instructions and no matrix units, is another design.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    facts = _cpu_facts()
    cooper_lake = (facts.get("cpu family"), facts.get("model")) == ("6", "85")
    return facts.get("vendor_id") != "GenuineIntel" or cooper_lake or "amx_bf16" in facts.get("flags", "").split()


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

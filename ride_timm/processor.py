"""What computes: its name, and the arithmetic that pays on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


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

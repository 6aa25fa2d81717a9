"""The processor's name, and where bfloat16 pays."""

import pytest
import torch

from ride_timm import hardware as processor


@pytest.fixture
def cpuinfo(monkeypatch):
    """Sets what /proc/cpuinfo holds; None: there is none."""

    def put(text):
        def read_text(path):
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(processor.Path, "read_text", read_text)

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
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert processor.processor_name() == name


INTEL, AMD = "vendor_id\t: GenuineIntel\nflags\t\t: fpu {}\n", "vendor_id\t: AuthenticAMD\nflags\t\t: fpu {}\n"


@pytest.mark.parametrize(
    ("instructions", "text", "pays"),
    [
        (True, AMD.format("avx512_bf16"), True),
        (True, INTEL.format("avx512_bf16 amx_bf16 amx_tile"), True),
        (True, INTEL.format("avx512_bf16 amx_tile"), False),  # bfloat16's matrix units are hidden
        (True, "cpu family\t: 6\nmodel\t\t: 85\n" + INTEL.format("avx512_bf16"), True),  # Cooper Lake
        (True, "cpu family\t: 6\nmodel\t\t: 207\n" + INTEL.format("avx512_bf16"), False),
        (True, "BogoMIPS\t: 50.00\n", True),  # ARM
        (True, None, True),
        (False, AMD.format("avx512f"), False),
        (False, INTEL.format("avx512f"), False),
    ],
)
def test_bf16_pays_where_it_is_faster(instructions, text, pays, cpuinfo, monkeypatch):
    cpuinfo(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    assert processor.bf16_pays() is pays


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_decides_for_itself(supported, cpuinfo, monkeypatch):
    cpuinfo(INTEL.format("avx512f"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert processor.bf16_pays() is supported

"""Multi-GPU estimate: formulas against a simulated ring, table against the docs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    sys.modules["scale"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["scale"])
    yield sys.modules["scale"]
    del sys.modules["scale"]


def _ring_all_reduce(values):
    """Simulate a ring all-reduce of P lists of P chunks -> lists, chunks sent by rank."""
    processes = len(values)
    sent = [0] * processes
    for gather in (False, True):
        for step in range(processes - 1):
            moves = []
            for rank in range(processes):
                chunk = (rank + gather - step) % processes
                moves.append(((rank + 1) % processes, chunk, values[rank][chunk]))
                sent[rank] += 1
            for to, chunk, value in moves:
                values[to][chunk] = value if gather else values[to][chunk] + value
    return values, sent


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_all_reduce_counts_the_bytes_of_a_ring(scale, processes):
    held, sent = _ring_all_reduce([[10 * rank + chunk for chunk in range(processes)] for rank in range(processes)])
    total = [sum(10 * rank + chunk for rank in range(processes)) for chunk in range(processes)]
    assert held == [total] * processes
    assert sent == [pytest.approx(scale.all_reduce(processes, processes))] * processes


def test_one_process_sends_nothing(scale):
    assert scale.all_reduce(1e6, 1) == scale.sync_bn((8, 16), 1) == 0


def test_counts_match_a_built_network(scale):
    counts = scale.count(scale.SETTINGS[0])
    model = timm.create_model("ride_resnet32", num_experts=3, num_classes=100)
    assert counts.params == sum(len(p.flatten()) for p in model.parameters())
    norms = [m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(counts.norm_channels) == sorted(norms) and len(norms) == 11 + 3 * 20
    assert counts.macs == pytest.approx(102.2e6, rel=2e-3)


def test_docs_hold_the_printed_table(scale, capsys):
    scale.estimate([])
    printed = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 2 + len(scale.SETTINGS)
    assert [line for line in page if line in table] == table
    assert printed[-1].startswith("largest fraction of a step spent on gradients")

"""Ways to skip experts: thresholds against brute force and the package's own routing."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from ride_timm.evaluation.macs import Macs
from ride_timm.evaluation.routing_curve import Outcomes

ROOT = Path(__file__).parents[2]
MACS = Macs(trunk=40.0, experts=(20.0, 20.0, 20.0), gates=(1.0, 1.0), params=0)
COUNTS = [200, 50, 10, 5]


@pytest.fixture(scope="module")
def routers():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("routers", ROOT / "benchmarks" / "routers.py")
        patched.setitem(sys.modules, "routers", importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules["routers"])
        yield sys.modules["routers"]


def images_of(routers, number=400):
    random = np.random.default_rng(0)
    right = random.random((number, 3)) < [0.5, 0.6, 0.7]
    gates = random.random((number, 2))
    return routers.Images(right, gates, 1 - gates, random.random(number) < 0.5, random.integers(0, 4, number))


def test_one_threshold_routes_as_the_package_does(routers):
    images = images_of(routers)
    outcomes = Outcomes(images.right, images.gates, images.targets)
    for threshold in (0.0, 0.3, 0.9, 1.0):
        assert np.array_equal(
            routers.by_thresholds(images.gates, (threshold, threshold)), outcomes.experts_used(threshold)
        )


@pytest.mark.parametrize("per_gate", [False, True])
def test_the_thresholds_are_the_best_within_the_budget(routers, monkeypatch, per_gate):
    monkeypatch.setattr(routers, "EACH", 9)
    monkeypatch.setattr(routers, "ONE", 9)
    images = images_of(routers, 60)
    weights = 1 / np.bincount(images.targets)[images.targets]
    found = routers.fit(images, images.gates, MACS, 85, per_gate)

    def score(thresholds):
        used = [1 if g[0] <= thresholds[0] else 2 if g[1] <= thresholds[1] else 3 for g in images.gates]
        spent = np.mean([40 + 20 * n + min(n, 2) for n in used])
        return (weights * [images.right[i, n - 1] for i, n in enumerate(used)]).sum() if spent <= 85 else -1

    if per_gate:
        columns = np.quantile(images.gates, np.linspace(0, 1, 9), axis=0).T
        every = [(a, b) for a in columns[0] for b in columns[1]]
    else:
        every = [(a, a) for a in np.quantile(images.gates, np.linspace(0, 1, 9))]
    assert score(found) == pytest.approx(max(map(score, every))) and score(found) > 0


def test_ways_without_thresholds_have_closed_forms(routers):
    images = images_of(routers)
    rows = {row["way"]: row for row in routers.compare(images, MACS, COUNTS, 80, (100, 20))}
    assert rows["all experts"]["all"] == pytest.approx(100 * images.right[:, 2].mean())
    assert rows["all experts"]["macs"] == 100
    agreed = images.agree.mean()
    assert rows["first two agree"]["macs"] == pytest.approx(80 * agreed + 100 * (1 - agreed))
    few = np.isin(images.targets, [2, 3])
    expected = np.where(images.agree, images.right[:, 1], images.right[:, 2])
    assert rows["first two agree"]["few"] == pytest.approx(100 * expected[few].mean())
    for name in ("router, one threshold", "router, one a gate", "margin, one threshold"):
        assert rows[name]["macs"] <= 84  # chosen on the other half

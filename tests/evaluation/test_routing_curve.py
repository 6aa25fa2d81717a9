import csv
import io
import json
import re

import numpy as np
import pytest
import timm
import torch

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.errors import InputError
from ride_timm.evaluation.evaluate import evaluate
from ride_timm.evaluation.macs import Macs
from ride_timm.evaluation.routing_curve import (
    Outcomes,
    collect_outcomes,
    curve_table,
    point_for_budget,
    prefix_points,
    routing_curve,
    thin,
)
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState

COUNTS = [300, 150, 50, 40, 20, 10, 5]
MACS = Macs(10.0, (5.0, 5.0, 5.0), (0.5, 0.5), 0)


@pytest.fixture(scope="module")
def world():
    """An untrained network whose gates differ by sample, and two batches that it labels rightly half of the time."""
    torch.manual_seed(0)
    model = timm.create_model("test_ride_resnet", num_classes=7, router=True).eval()
    with torch.no_grad():
        for hidden in model.router.hidden:
            hidden.weight.normal_(0, 2)
        model.router.fc[0].weight.normal_(0, 0.5)
    images = torch.randn(60, 3, 32, 32)
    with torch.no_grad():
        prefix = model.forward_experts(images)[1].cumsum(1)  # some are right with one expert, some with two or three
        spread = model.router(*model.forward_experts(images))
        model.router.fc[0].bias -= spread.median()
    targets = torch.where(torch.rand(60) < 0.7, prefix[torch.arange(60), torch.arange(60) % 3].argmax(1), 0)
    return model, [(images[:37], targets[:37]), (images[37:], targets[37:])]


@pytest.fixture(scope="module")
def outcomes(world):
    return collect_outcomes(*world)


def random_outcomes(n=40, experts=4, seed=0):
    rng = np.random.default_rng(seed)
    gates = rng.random((n, experts - 1)).round(1).astype(np.float32)  # with ties, zeros and ones
    return Outcomes(rng.random((n, experts)) < 0.5, gates, rng.integers(0, 7, n))


def at(outcomes, threshold, weights=None):
    """Accuracy and experts used at a threshold, sample by sample."""
    weights = np.ones(len(outcomes.targets)) if weights is None else weights
    number = outcomes.experts_used(threshold)
    right = outcomes.right[np.arange(len(number)), number - 1]
    used = [weights[number == i + 1].sum() / weights.sum() for i in range(outcomes.right.shape[1])]
    return 100 * (weights * right).sum() / weights.sum(), used


def test_outcomes_agree_with_forward_routed(world, outcomes):
    model, batches = world
    images = torch.cat([images for images, _ in batches])
    assert set(outcomes.experts_used(0.5)) == {1, 2, 3}
    for threshold in (0.0, 0.3, 0.5, 0.6, 1.0):
        with torch.no_grad():
            used = model.forward_routed(images, threshold)[1]
        assert outcomes.experts_used(threshold).tolist() == used.tolist()


def test_every_point_agrees_with_forward_routed(world, outcomes):
    curve = routing_curve(outcomes, MACS, COUNTS)
    assert len(curve) > 3
    for point in curve:
        metrics = evaluate(*world, COUNTS, routed=True, threshold=point["threshold"])
        for name in ("all", "many", "medium", "few", "experts_used"):
            assert point[name] == metrics[name], name
        assert point["macs"] == MACS.expected(metrics["experts_used"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_curve_is_the_front_of_all_thresholds(seed, weighted):
    outcomes = random_outcomes(seed=seed)
    weights = outcomes.balanced_weights() if weighted else None
    macs = Macs(10.0, (5.0,) * 4, (0.5,) * 3, 0)
    front, best = [], -1.0
    for threshold in sorted({0.0, 1.0, *outcomes.gates.ravel().tolist()}, reverse=True):
        accuracy, used = at(outcomes, threshold, weights)
        if accuracy > best + 1e-9:
            front.append((accuracy, macs.expected(used)))
            best = accuracy
    curve = routing_curve(outcomes, macs, COUNTS, weights)
    np.testing.assert_allclose([(point["all"], point["macs"]) for point in curve], front, rtol=1e-12)
    for point in curve:
        accuracy, used = at(outcomes, point["threshold"], weights)
        np.testing.assert_allclose([accuracy, *used], [point["all"], *point["experts_used"]], rtol=0, atol=1e-9)


def test_balanced_weights_are_a_balanced_set():
    outcomes = random_outcomes(n=30)
    outcomes = Outcomes(outcomes.right, outcomes.gates, np.repeat([0, 1, 2], [20, 8, 2]))
    rows = np.concatenate([np.tile(np.arange(20), 2), np.tile(np.arange(20, 28), 5), np.tile(np.arange(28, 30), 20)])
    repeated = Outcomes(outcomes.right[rows], outcomes.gates[rows], outcomes.targets[rows])
    macs = Macs(10.0, (5.0,) * 4, (0.5,) * 3, 0)
    weighted = routing_curve(outcomes, macs, [9, 9, 9], outcomes.balanced_weights())
    plain = routing_curve(repeated, macs, [9, 9, 9])
    keys = ("threshold", "all", "macs")
    np.testing.assert_allclose([[p[k] for k in keys] for p in weighted], [[p[k] for k in keys] for p in plain])


def test_thresholds_next_to_each_other():
    low = np.float32(0.5)
    high = np.nextafter(low, np.float32(1))
    right = np.array([[0, 1], [0, 1], [0, 1]], dtype=bool)
    outcomes = Outcomes(right, np.array([[low], [high], [1.0]], dtype=np.float32), np.zeros(3, int))
    curve = routing_curve(outcomes, Macs(1.0, (1.0, 1.0), (0.0,), 0), [9])
    assert [round(point["all"]) for point in curve] == [0, 33, 67, 100]
    assert [(outcomes.experts_used(p["threshold"]) == 2).sum() for p in curve] == [0, 1, 2, 3]


def test_the_threshold_for_a_budget(outcomes):
    curve = routing_curve(outcomes, MACS, COUNTS)
    thresholds = np.linspace(0, 1, 500)
    for budget in (15.5, 17.0, 20.0, 23.0, 1e9):
        point = point_for_budget(curve, budget)
        assert point["macs"] <= budget
        tried = [at(outcomes, t) for t in thresholds]
        assert point["all"] >= max(a for a, used in tried if MACS.expected(used) <= budget) - 1e-9
    with pytest.raises(InputError, match="smallest budget possible is 16"):
        point_for_budget(curve, 15.4)


def test_prefixes_are_the_first_experts_always(world, outcomes):
    model, batches = world
    points = prefix_points(outcomes, MACS, COUNTS)
    assert [point["macs"] for point in points] == [15.0, 20.0, 25.0]
    for i, point in enumerate(points):
        hits = []
        for images, targets in batches:
            with torch.no_grad():
                logits = model.forward_experts(images, use_experts=range(i + 1))[1].mean(1)
            hits.append(logits.argmax(1) == targets)
        assert point["all"] == 100 * torch.cat(hits).sum().item() / 60
    assert points[2]["all"] == evaluate(model, batches, COUNTS)["all"]


def test_thinning_keeps_the_ends():
    curve = [dict(macs=i) for i in range(1000)]
    thinned = thin(curve, 200)
    assert len(thinned) == 200 and thinned[0] is curve[0] and thinned[-1] is curve[-1]
    assert thin(curve[:5]) == curve[:5]


def test_the_table(outcomes):
    curve, prefixes = routing_curve(outcomes, MACS, COUNTS), prefix_points(outcomes, MACS, COUNTS)
    rows = list(csv.DictReader(io.StringIO(curve_table(curve, prefixes))))
    assert [row["experts"] for row in rows] == ["routed"] * len(curve) + ["1", "2", "3"]
    assert float(rows[0]["all"]) == curve[0]["all"] and float(rows[0]["used_1"]) == curve[0]["experts_used"][0]


def test_a_model_without_a_router():
    with pytest.raises(InputError, match="no router"):
        collect_outcomes(timm.create_model("test_ride_resnet"), [])


# python -m ride_timm evaluate --routed --macs-budget … --curve …


def run_folder(path, colours, router=True, **recipe):
    torch.manual_seed(0)
    model = timm.create_model("ride_resnet32", num_classes=3, router=router, top_choices_num=3)
    folder = RunFolder(path)
    folder.begin(
        load_recipe("fashion_lt").override(dict(dataset=str(colours), imb_type="none", **recipe)), TrainingState()
    )
    config = dict(input_size=(3, 28, 28), mean=(0.286,) * 3, std=(0.353,) * 3, crop_pct=1.0, interpolation="bilinear")
    folder.export(model.eval(), config, ("a", "b", "c"))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, colours):
    return run_folder(tmp_path_factory.mktemp("run"), colours)


def output(capsys, *argv):
    assert exit_code(main, ["evaluate", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_a_budget_on_the_command_line(capsys, run):
    found = json.loads(output(capsys, "--model", run, "--routed", "--macs-budget", "60e6", "--json"))
    chosen = found["chosen_on"]
    assert found["macs_budget"] == 60e6 and found["threshold"] == chosen["threshold"] and chosen["macs"] <= 60e6
    assert chosen["seen_in_training"] and chosen["images"] == 6 + 3 + 2  # a fifth of 30, 16 and 8
    again = ("--model", run, "--routed", "--threshold", found["threshold"], "--json")
    repeated = json.loads(output(capsys, *again))
    assert repeated == {key: value for key, value in found.items() if key not in ("macs_budget", "chosen_on")}
    text = output(capsys, "--model", run, "--routed", "--macs-budget", "60e6")
    assert float(re.search(r"^threshold (\S+) for at most", text, re.M)[1]) == chosen["threshold"]
    assert "for at most 60.0 MMACs" in text and "SEEN in training" in text


def test_the_runs_own_held_out_images_choose(capsys, tmp_path, colours):
    run = run_folder(tmp_path, colours, holdout=0.5)
    argv = ("--model", run, "--routed", "--macs-budget", "1e9")
    chosen = json.loads(output(capsys, *argv, "--json"))["chosen_on"]
    assert not chosen["seen_in_training"] and chosen["images"] == 15 + 8 + 4
    assert "that the run held out" in output(capsys, *argv)


def test_curves_on_the_command_line(capsys, tmp_path, run):
    pytest.importorskip("matplotlib")
    plain = json.loads(output(capsys, "--model", run, "--json"))
    found = json.loads(output(capsys, "--model", run, "--curve", tmp_path / "curve.csv", "--json"))
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert len(rows) == len(found["curve"]) + 3 and [row["experts"] for row in rows[-3:]] == ["1", "2", "3"]
    assert found["prefixes"][2]["all"] == plain["all"] and float(rows[-1]["macs"]) == pytest.approx(plain["macs"])
    assert "2 experts always" in output(capsys, "--model", run, "--routed", "--curve", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.csv", "curve.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--macs-budget", "80e6"), "pass --routed"),
        (("--routed", "--macs-budget", "nan"), "expected MACs per image"),
        (("--routed", "--macs-budget", "many"), "many"),
        (("--routed", "--macs-budget", "-1"), "expected MACs per image"),
        (("--routed", "--macs-budget", "1e6"), "the smallest budget possible is"),
        (("--routed", "--macs-budget", "80e6", "--threshold", "0.2"), "leave --threshold out"),
        (("--curve", "curve.txt"), ".png or a .csv"),
        (("--curve", "nowhere/curve.csv"), "no folder nowhere"),
    ],
)
def test_bad_input(capsys, monkeypatch, tmp_path, run, flags, message):
    monkeypatch.chdir(tmp_path)
    assert exit_code(main, ["evaluate", "--model", run, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


def test_a_curve_needs_a_router(capsys, tmp_path, colours):
    run = run_folder(tmp_path, colours, router=False)
    assert exit_code(main, ["evaluate", "--model", run, "--curve", str(tmp_path / "c.csv")]) == 2
    assert "no router" in capsys.readouterr().err

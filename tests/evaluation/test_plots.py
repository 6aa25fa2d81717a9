"""Plots, read back from their figures."""

import math

import pytest
import torch

from ride_timm.data.image_set import LongTailData
from ride_timm.evaluation import figures, plots
from ride_timm.evaluation.counts import CountAccumulator
from ride_timm.evaluation.metrics import compute_metrics
from ride_timm.evaluation.plots import COLOURS

pytest.importorskip("matplotlib")
COUNTS, NAMES, SHOTS = [5, 200, 50], ("rare", "common", "medium"), (100, 20)


def measured(routed):
    """Two images of each class; the experts differ on the rare class alone, where the second one is right."""
    targets = torch.arange(3).repeat(2)
    right = 8.0 * torch.nn.functional.one_hot(targets, 3).float()
    wrong = torch.where(targets[:, None] == 0, right.roll(1, 1), right)
    counts = CountAccumulator(3, 2 if routed else None, None if routed else 2)
    if routed:
        counts.update(right, targets, experts_used=torch.tensor([2, 1, 1, 2, 1, 2]))
    else:
        counts.update(right, targets, member_logits=torch.stack([wrong, right], 1))
    return compute_metrics(counts.reduce(), COUNTS)


@pytest.fixture
def drawn(monkeypatch):
    """The figures by file name."""
    saved, save = {}, figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: saved.update({path.name: figure}) or save(figure, path))
    return saved


def heights(axes):
    return [[bar.get_height() for bar in bars] for bars in axes.containers]


def colours(axes, k=0):
    from matplotlib.colors import to_hex

    return [to_hex(bar.get_facecolor()) for bar in axes.containers[k]]


def test_experts_alone_their_differences_and_how_many_are_used(drawn, tmp_path):
    plots.plot_experts(tmp_path / "experts.png", {"ensemble": measured(False), "routed": measured(True)})
    alone, used, differing, diversity = drawn["experts.png"].axes
    assert heights(alone) == [[100] * 4, [100] * 4, pytest.approx([100 * 4 / 6, 100, 100, 0]), [100] * 4]
    assert [bars.get_label() for bars in alone.containers] == ["ensemble", "routed", "expert 1", "expert 2"]
    assert len({colours(alone, k)[0] for k in range(4)}) == 4
    assert heights(differing)[0] == pytest.approx([100 / 3, 0, 0, 100])
    assert colours(differing) == colours(diversity) == list(COLOURS.values())
    assert heights(diversity)[0][3] > 0
    assert heights(used) == [pytest.approx([50, 100, 50, 0]), pytest.approx([50, 0, 50, 100])]  # all, many, medium, few
    assert [bars.get_label() for bars in used.containers] == ["1 expert", "2 experts"]
    tops = [bar.get_y() + bar.get_height() for bar in used.containers[1]]
    assert tops == pytest.approx([100] * 4)


def test_the_chosen_experts_are_named_by_their_numbers(drawn, tmp_path):
    plots.plot_experts(tmp_path / "experts.png", {"experts 1,3": measured(False) | dict(members=[1, 3])})
    labels = [bars.get_label() for bars in drawn["experts.png"].axes[0].containers]
    assert labels == ["experts 1,3", "expert 1", "expert 3"]


def test_classes_from_head_to_tail(drawn, tmp_path):
    plots.plot_long_tail(tmp_path / "long_tail.png", {"ensemble": measured(False)}, COUNTS, NAMES, SHOTS)
    images, accuracy = drawn["long_tail.png"].axes
    assert heights(images)[0] == [200, 50, 5] and heights(accuracy) == [[100, 100, 100]]
    assert colours(images) == colours(accuracy) == [COLOURS[group] for group in ("many", "medium", "few")]
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["common", "medium", "rare"]
    assert "few 100.0" in accuracy.get_title()
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[100, 100]] * 3  # means of the groups


def test_training_images_of_a_short_tail_are_plain_numbers_beside_no_legend(drawn, tmp_path):
    counts, metrics = [500] * 2 + [50], measured(False)
    plots.plot_long_tail(tmp_path / "long_tail.png", {"ensemble": metrics}, counts, NAMES, SHOTS)
    images = drawn["long_tail.png"].axes[0]
    labels = [label.get_text() for which in ("major", "minor") for label in images.get_yticklabels(which=which)]
    assert {"60", "100", "200", "300", "400"} <= set(labels) and not any("$" in label for label in labels)
    (legend,) = drawn["long_tail.png"].legends  # above the panels: bars of equal height would run through it
    assert images.get_legend() is None
    assert [text.get_text() for text in legend.get_texts()] == ["mean of the group", "many-shot", "medium-shot"]


def test_many_classes_are_averaged_within_their_group(drawn, tmp_path):
    counts = [1000] * 399 + [5] * 1
    metrics = dict(measured(False), per_class=[50.0] * 398 + [None, 10.0])
    plots.plot_long_tail(tmp_path / "long_tail.png", {"ensemble": metrics}, counts, list(map(str, range(400))), SHOTS)
    bars = drawn["long_tail.png"].axes[1].containers[0]
    assert [bar.get_height() for bar in bars] == [50.0] * 100 + [10.0]
    assert sum(round(bar.get_width()) for bar in bars) == 400


def test_groups_and_classes_without_test_images_have_no_bar(drawn, tmp_path):
    metrics = measured(False)
    metrics |= dict(few=None, per_class=[None, 100.0, 0.0])
    for values in metrics["experts"].values():
        values["few"] = [None] * 2 if isinstance(values["few"], list) else None
    plots.plot_metrics(tmp_path, {"ensemble": metrics}, COUNTS, NAMES, SHOTS)
    alone, differing, diversity = drawn["experts.png"].axes[:3]
    for axes in (alone, differing, diversity):
        assert all(math.isnan(bars[3]) and not math.isnan(bars[2]) for bars in heights(axes))
    tops = [text.get_text() for text in alone.texts]
    assert tops == ["100", "100", "100", "", "67", "100", "100", "", "100", "100", "100", ""]
    accuracy = drawn["long_tail.png"].axes[1]
    assert heights(accuracy)[0] == [100, 0, pytest.approx(math.nan, nan_ok=True)]
    assert [line.get_ydata()[0] for line in accuracy.lines[:2]] == [100, 0]
    assert math.isnan(accuracy.lines[2].get_ydata()[0])


def test_one_axis_a_panel_and_all_files(drawn, tmp_path):
    history = [dict(stage="experts", epoch=1, loss=2.0, all=None, many=None, medium=None, few=None)]
    history += [dict(stage="experts", epoch=2, loss=1.0, all=50.0, many=50.0, medium=50.0, few=None)]
    history += [dict(stage="router", epoch=1, loss=0.5, all=50.0, many=50.0, medium=50.0, few=None)]
    results = dict(stages=dict(experts=measured(False), router=measured(True)), class_counts=COUNTS)
    plots.plot_run(tmp_path, history, results, LongTailData(object(), object(), NAMES, "a stream"), SHOTS)
    names = {"curves.png", "long_tail.png", "reliability.png", "experts.png"}
    assert {path.name for path in tmp_path.iterdir()} == set(drawn) == names
    for figure in drawn.values():
        assert all(not axes._twinned_axes.get_siblings(axes)[1:] for axes in figure.axes)
        assert all(axes.get_title() for axes in figure.axes if axes.axison and figure is not drawn["reliability.png"])
    loss, accuracy = drawn["curves.png"].axes[:2]
    assert list(loss.lines[0].get_ydata()) == [2.0, 1.0]
    assert [line.get_color() for line in accuracy.lines] == list(COLOURS.values())


def test_heads_rebalanced_in_closed_form_have_no_curves(drawn, tmp_path):
    results = dict(stages=dict(heads=measured(False)), class_counts=COUNTS)
    plots.plot_run(tmp_path, [], results, LongTailData(object(), object(), NAMES, "a stream"), SHOTS)
    assert set(drawn) == {"long_tail.png", "reliability.png", "experts.png"}


def test_what_was_not_measured_is_left_out(drawn, tmp_path):
    metrics = measured(False)
    del metrics["experts"]  # as for an ONNX graph, which returns the mean alone
    plots.plot_experts(tmp_path / "experts.png", {"ensemble": metrics})
    (accuracy,) = drawn["experts.png"].axes
    assert heights(accuracy) == [[100] * 4]


def test_routing_with_the_chosen_threshold(drawn, tmp_path):
    def point(macs, accuracy):
        return dict(threshold=0.5, macs=macs, all=accuracy, many=accuracy, medium=None, few=accuracy)

    curve, prefixes = [point(50e6, 40.0), point(80e6, 45.0)], [point(50e6, 40.0), point(100e6, 45.0)]
    plots.plot_routing(tmp_path / "routing.png", curve, prefixes, point(70e6, 44.0))
    panels = drawn["routing.png"].axes
    assert [axes.get_title() for axes in panels] == ["all classes", "many-shot classes", "few-shot classes"]
    assert [list(line.get_xdata()) for line in panels[0].lines] == [[50, 100], [50, 80], [70]]
    assert panels[2].lines[1].get_color() == COLOURS["few"]
    assert [text.get_text() for text in panels[0].texts] == ["1", "2"]
    (legend,) = drawn["routing.png"].legends
    assert legend.get_texts()[1].get_text() == "router, best thresholds"  # the curve holds Pareto points alone

"""What is drawn of the measures, read back from the figures."""

import pytest
import torch

from ride_timm.evaluation import plots
from ride_timm.evaluation.counts import CountAccumulator
from ride_timm.evaluation.metrics import compute_metrics

pytest.importorskip("matplotlib")
COUNTS = [200, 50, 5]


def measured(routed):
    """Two images of each class; experts 0 and 1 differ on the last class alone, expert 1 is the one that is right."""
    targets = torch.arange(3).repeat(2)
    right = 8.0 * torch.nn.functional.one_hot(targets, 3).float()
    wrong = torch.where(targets[:, None] == 2, right.roll(1, 1), right)
    counts = CountAccumulator(3, 2 if routed else None, None if routed else 2)
    if routed:
        counts.update(right, targets, experts_used=torch.tensor([1, 1, 2, 1, 2, 2]))
    else:
        counts.update(right, targets, member_logits=torch.stack([wrong, right], 1))
    return compute_metrics(counts.reduce(), COUNTS)


def test_experts_alone_their_differences_and_how_many_are_used():
    figure = plots._experts({"ensemble": measured(False), "routed": measured(True)})
    alone, differing, routed, used, nats = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in alone.containers]  # all, many, medium, few
    assert heights[0] == [100, 100, 100, 100]  # the ensemble
    assert heights[1] == pytest.approx([100 * 4 / 6, 100, 100, 0]) and heights[2] == [100, 100, 100, 100]
    assert [bars.get_label() for bars in alone.containers] == ["ensemble", "expert 0", "expert 1"]
    assert [bar.get_height() for bar in differing.containers[0]] == pytest.approx([100 / 3, 0, 0, 100])
    assert nats.get_ylabel().startswith("diversity") and nats.lines[0].get_ydata()[-1] > 0
    assert [[bar.get_height() for bar in bars] for bars in routed.containers] == [[100] * 4]
    shares = [[bar.get_height() for bar in bars] for bars in used.containers]
    assert shares == [pytest.approx([50, 100, 50, 0]), pytest.approx([50, 0, 50, 100])]
    tops = [bar.get_y() + bar.get_height() for bar in used.containers[1]]
    assert tops == pytest.approx([100] * 4)


def test_what_was_not_measured_is_left_out(tmp_path):
    metrics = measured(False)
    del metrics["experts"]  # as of a graph that gives the mean alone
    written = plots.plot_measures(tmp_path, {"ensemble": metrics})
    assert {path.name for path in written} == {"head_to_tail.png", "reliability.png", "experts.png"}
    assert not plots._experts({"ensemble": metrics}).axes[1].axison

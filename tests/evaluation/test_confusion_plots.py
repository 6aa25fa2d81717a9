"""Pictures of confusions, read back from their figures."""

import numpy as np
import pytest
import torch
from encoded_images import encoded, image_set, smooth

from ride_timm.evaluation import figures
from ride_timm.evaluation.confusion_plots import plot_confusion_gallery, plot_confusion_matrix, write_confusions
from ride_timm.evaluation.counts import CountAccumulator
from ride_timm.evaluation.figures import COLOURS
from ride_timm.evaluation.metrics import compute_metrics

pytest.importorskip("matplotlib")
COUNTS, NAMES, SHOTS = [5, 200, 50], ("$rare$", "common", "a medium class with a long name"), (100, 20)
TRUE, PREDICTED = [0, 0, 0, 1, 1, 2], [1, 1, 2, 1, 1, 0]


@pytest.fixture
def drawn(monkeypatch):
    saved, save = {}, figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: saved.update({path.name: figure}) or save(figure, path))
    return saved


def counted(true=TRUE, predicted=PREDICTED, num_classes=3):
    counts = CountAccumulator(num_classes)
    counts.update(10.0 * torch.eye(num_classes)[predicted], torch.tensor(true))
    return counts.reduce()


def test_the_matrix_from_head_to_tail(drawn, tmp_path):
    write_confusions(tmp_path, counted(), COUNTS, NAMES, SHOTS)
    assert {path.name for path in tmp_path.iterdir()} == {"classes.csv", "confusion_matrix.csv", "confusion_matrix.png"}
    bars, matrix, _ = drawn["confusion_matrix.png"].axes
    assert [bar.get_width() for bar in bars.containers[0]] == [2, 1, 1]
    assert bars.get_yticklabels()[0].get_text() == r"\$rare\$ → common"
    assert [text.get_text() for text in bars.texts] == [" 67 %", " 33 %", " 100 %"]
    order = ["common", "a medium class with a…", r"\$rare\$"]
    assert [text.get_text() for text in matrix.get_yticklabels()] == order
    expected = [[100, 0, 0], [0, 0, 100], [200 / 3, 100 / 3, 0]]
    np.testing.assert_allclose(matrix.collections[0].get_array().reshape(3, 3), expected)
    assert [line.get_color() for line in matrix.lines[::2]] == [COLOURS[name] for name in ("many", "medium", "few")]


def test_neighbouring_classes_share_a_cell(drawn, tmp_path):
    true = np.arange(400)
    predicted = np.where(true < 200, true, (true + 1) % 400)
    names = [str(c) for c in true]
    plot_confusion_matrix(tmp_path / "m.png", counted(true, predicted, 400), [1000] * 200 + [5] * 200, names, SHOTS)
    cells = drawn["m.png"].axes[1].collections[0].get_array().reshape(100, 100)
    assert cells[0, 0] == 100 and cells[60, 60] == 75 and cells[60, 61] == 25 and cells[99, 0] == 25


def test_a_row_of_the_gallery_shows_test_images_and_training_images(drawn, tmp_path):
    test = image_set(*[encoded(smooth(10 + i, 30), "PNG") for i in range(6)])
    train = image_set(*[encoded(smooth(40, 20 + i), "PNG") for i in range(4)])  # of classes 0, 1, 0, 1
    metrics = compute_metrics(counted(), COUNTS, SHOTS)
    plot_confusion_gallery(tmp_path / "c.png", metrics, COUNTS, NAMES, SHOTS, test, train)
    axes = np.reshape(drawn["c.png"].axes, (3, 10))
    shown = [[a.images[0].get_array().shape[0] if a.images else None for a in line[1:]] for line in axes]
    first = [10, 11, None, None, None, 21, 23, None, None]  # sizes: test images 0 and 1, training images of class 1
    assert shown == [first, [12] + [None] * 8, [15] + [None] * 4 + [20, 22, None, None]]
    assert [text.get_text() for text in axes[0, 0].texts][:2] == [r"\$rare\$", "→ common"]
    assert axes[0, 1].get_title() == "100 %"


def test_images_that_are_gone_are_left_out(drawn, tmp_path):
    metrics = compute_metrics(counted(), COUNTS, SHOTS)
    broken = image_set(*[b"broken"] * 6)
    plot_confusion_gallery(tmp_path / "c.png", metrics, COUNTS, NAMES, SHOTS, broken, broken)
    assert not any(axes.images for axes in drawn["c.png"].axes)


def test_no_gallery_without_a_confusion(tmp_path):
    metrics = compute_metrics(counted(TRUE, TRUE), COUNTS, SHOTS)
    plot_confusion_gallery(tmp_path / "c.png", metrics, COUNTS, NAMES, SHOTS, image_set(), image_set())
    plot_confusion_matrix(tmp_path / "m.png", counted(TRUE, TRUE), COUNTS, NAMES, SHOTS)
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]

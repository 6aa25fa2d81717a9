"""Confusions against plain loops over single images."""

import csv
from collections import Counter

import numpy as np
import torch

from ride_timm.evaluation.confusions import confusion_matrix, largest_confusions, write_confusion_matrix
from ride_timm.evaluation.counts import CountAccumulator
from ride_timm.evaluation.tables import confusions_table

NAMES = ("a", "b, c", "d", "e")


def counted(n=500):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (n,), generator=generator)
    logits = torch.randn(n, 4, generator=generator) + torch.nn.functional.one_hot((targets + 1) % 4, 4)
    counts = CountAccumulator(4)
    for rows in torch.arange(n).split(64):
        counts.update(logits[rows], targets[rows])
    return counts.reduce(), logits, targets


def test_predictions_are_kept_in_order():
    counts, logits, targets = counted()
    assert counts.targets.tolist() == targets.tolist() and counts.predictions.tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(counts.probabilities, logits.softmax(1).amax(1), rtol=1e-6)


def test_slices_of_processes_are_put_into_the_order_of_the_test_set(monkeypatch):
    def gather(found, own):
        found[:] = [own, [(np.array([2, 3]), np.array([2, 3]), np.ones(2))]]

    counts = CountAccumulator(6)
    for rows in ([0, 1], [4, 5]):
        counts.update(torch.eye(6)[rows], torch.tensor(rows))
    for name, replacement in dict(is_initialized=lambda: True, get_world_size=lambda: 2).items():
        monkeypatch.setattr(torch.distributed, name, replacement)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert counts.reduce().targets.tolist() == list(range(6))


def test_the_matrix_counts_images_by_class_and_prediction(tmp_path):
    counts, logits, targets = counted()
    pairs = Counter(zip(targets.tolist(), logits.argmax(1).tolist(), strict=True))
    matrix = confusion_matrix(counts.targets, counts.predictions, 4)
    assert matrix.tolist() == [[pairs[t, p] for p in range(4)] for t in range(4)]
    assert matrix.sum(1).tolist() == counts.images.tolist() and matrix.diagonal().tolist() == counts.right.tolist()
    write_confusion_matrix(tmp_path / "m.csv", matrix, NAMES)
    with (tmp_path / "m.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == list(NAMES)
    assert [list(map(int, row[1:])) for row in rows] == matrix.tolist()


def test_the_largest_confusions_and_their_most_confident_images():
    counts, logits, targets = counted()
    predictions, chances = logits.argmax(1).tolist(), logits.softmax(1).amax(1).tolist()
    wrong = [(t, p) for t, p in zip(targets.tolist(), predictions, strict=True) if t != p]
    expected = sorted(Counter(wrong).items(), key=lambda item: (-item[1], item[0]))
    found = largest_confusions(counts, most=3)
    assert [((row["true"], row["predicted"]), row["images"]) for row in found] == expected[:3]
    for row in found:
        assert row["percent"] == 100 * row["images"] / targets.tolist().count(row["true"])
        mine = [i for i in range(500) if (targets[i], predictions[i]) == (row["true"], row["predicted"])]
        assert [example["image"] for example in row["examples"]] == sorted(mine, key=lambda i: -chances[i])[:4]
        assert all(abs(example["probability"] - chances[example["image"]]) < 1e-5 for example in row["examples"])
    first = confusions_table(dict(confusions=found), NAMES).splitlines()[2]
    true, predicted, images = (found[0][key] for key in ("true", "predicted", "images"))
    assert first.startswith(f"{NAMES[true]} → {NAMES[predicted]} ") and f" {images} " in first


def test_no_confusion():
    counts = CountAccumulator(3)
    counts.update(torch.eye(3), torch.arange(3))
    assert largest_confusions(counts.reduce()) == []

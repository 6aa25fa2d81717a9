"""Best epoch and patience."""

import torch
from torch import nn

from ride_timm.training.selection import Selection


def test_best_keeps_a_copy_of_the_first_best_weights():
    model = nn.Linear(1, 1)
    selection = Selection(patience=None, eval_every=1)
    for epoch, accuracy in enumerate((10.0, 30.0, 30.0, 20.0), 1):
        nn.init.constant_(model.weight, epoch)
        selection.update(accuracy, epoch, model.state_dict())
    assert selection.best["epoch"] == 2 and selection.best["accuracy"] == 30.0
    torch.testing.assert_close(selection.best["model"]["weight"], torch.full((1, 1), 2.0))
    assert not selection.exhausted(1000)


def test_patience_counts_evaluations():
    selection = Selection(patience=2, eval_every=5)
    selection.update(1.0, 5, nn.Linear(1, 1).state_dict())
    assert [selection.exhausted(epochs) for epochs in (5, 10, 14, 15, 20)] == [False, False, False, True, True]

"""A batch that does not fit: one line, and the largest part of it that fits."""

import re

import pytest
import torch
from journeys import flags_of

from ride_timm.training.objectives import ExpertsObjective, RouterObjective

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture
def small_memory(monkeypatch):
    """Let an objective run out of memory above a number of images."""

    def limit(objective, most):
        forward = objective.forward

        def limited(self, images, targets):
            if len(images) > most:
                raise torch.OutOfMemoryError(FULL)
            return forward(self, images, targets)

        monkeypatch.setattr(objective, "forward", limited)

    return limit


@pytest.mark.parametrize(
    ("most", "more", "way"),
    [
        (5, [], "4 fit; pass --batch-size 4 --gradient-accumulation 4."),
        (8, ["--gradient-accumulation", "3"], "8 fit; pass --batch-size 8 --gradient-accumulation 6."),
        (0, [], "pass a smaller --batch-size, with --gradient-accumulation for nearly the same updates."),
    ],
)
def test_a_batch_that_is_too_large_names_one_that_fits(train, colours, tmp_path, capsys, small_memory, most, more, way):
    small_memory(ExpertsObjective, most)
    assert train(flags_of(colours, tmp_path / "run", *more)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: out of memory: --batch-size 16, 16 images on cpu \(.*\): " + re.escape(way), line)


def test_each_stage_names_its_own_flag(train, colours, tmp_path, capsys, small_memory):
    small_memory(RouterObjective, 20)
    assert train(flags_of(colours, tmp_path / "run", "--epochs", "1")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--router-batch-size 32, 32 images" in line and "16 fit; pass --router-batch-size 16" in line

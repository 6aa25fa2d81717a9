"""A batch that does not fit: one line, and the largest part of it that fits."""

import re

import pytest
import torch
from journeys import flags_of

from ride_timm.training.objectives import ExpertsObjective, RouterObjective
from ride_timm.training.run_folder import RunFolder

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


@pytest.mark.parametrize(
    ("objective", "flags"),
    [
        (ExpertsObjective, "--batch-size 8 --gradient-accumulation 2"),
        (RouterObjective, "--router-batch-size 16 --stage router"),
    ],
)
def test_the_way_out_works_in_the_same_folder(train, colours, tmp_path, capsys, small_memory, objective, flags):
    small_memory(objective, 8 if objective is ExpertsObjective else 16)
    command = flags_of(colours, tmp_path / "run", "--epochs", "1")
    assert train(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f" fit; pass {flags}.")
    assert train([*command, *flags.split()]) == 0
    assert {"experts", "router"} == RunFolder(tmp_path / "run").results()["stages"].keys()

"""Commands run in this process, and a run folder of untrained weights."""

import timm
import torch

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState

CLASSES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION = dict(input_size=(3, 28, 28), mean=(0.286,) * 3, std=(0.353,) * 3, crop_pct=1.0, interpolation="bilinear")


def run_folder(path, num_classes=10, router=True):
    """Write a run folder with untrained weights."""
    torch.manual_seed(0)
    model = timm.create_model("test_ride_resnet", num_classes=num_classes, router=router, top_choices_num=3)
    folder = RunFolder(path)
    folder.begin(load_recipe("fashion_lt"), TrainingState())
    folder.export(model.eval(), FASHION, CLASSES[:num_classes])
    return path


def output(capsys, *argv) -> str:
    assert exit_code(main, [str(part) for part in argv]) == 0
    captured = capsys.readouterr()
    assert not captured.err or "error:" not in captured.err
    return captured.out


def refusal(capsys, *argv) -> str:
    """Run a command that exits with 2 -> its one error line."""
    assert exit_code(main, [str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return captured.err

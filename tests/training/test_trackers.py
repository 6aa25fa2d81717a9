"""Trackers: both stages apart, numbers as numbers, and at the end the results and the plots."""

import json
import threading

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from journeys import fill
from PIL import Image

from ride_timm import RunError
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.trackers import end_trackers, hyperparameters, log_epoch, log_results, start_trackers

EXPERTS = dict(all=50.0, many=60.0, medium=None, few=40.0, top5=90.0, macs=3000, epochs=3, per_class=[60.0, 40.0])
ROUTER = EXPERTS | dict(macs=2000, epochs=2, threshold=0.5, experts_used=[0.5, 0.25, 0.25])


@pytest.mark.parametrize("name", ["lr", "epochs", "decay_epochs", "auto_augment", "dataset"])
def test_hyperparameters_keep_their_type(name):
    recipe = load_recipe("fashion_lt")
    value, given = getattr(recipe, name), hyperparameters(recipe)[name]
    assert given == (value if isinstance(value, int | float | str) else str(value))
    assert type(given) in (int, float, str, bool)


def test_a_tracker_that_does_not_start_says_so(tmp_path):
    class Accelerator:
        log_with = ("wandb",)

        def init_trackers(self, *args, **kwargs):
            raise ConnectionError("No API key configured")

    with pytest.raises(RunError, match=r"wandb did not start \(ConnectionError: No API key.*pass --resume"):
        start_trackers(Accelerator(), load_recipe("fashion_lt"), RunFolder(tmp_path))


def test_a_full_disk_ends_the_run_with_one_line(disk, monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # restored after the test
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=disk)
    start_trackers(accelerator, load_recipe("fashion_lt"), RunFolder(disk))
    log_epoch(accelerator, dict(stage="experts", loss=1.0), step=1)
    ballast = fill(disk)
    with pytest.raises(
        RunError, match=r"^tracker tensorboard failed \(OSError: .*No space left.*\): pass --resume, wi"
    ):
        for step in range(2, 1000):  # the last block of the file has room for some
            log_epoch(accelerator, dict(stage="experts", loss=1.0), step)
    with pytest.raises(RunError, match="tracker tensorboard failed"):
        end_trackers(accelerator)
    ballast.unlink()
    assert capsys.readouterr().err == ""


class Tracker:
    """A tracker, and an accelerator with only this one, that keeps what it is given."""

    def __init__(self, name):
        self.name, self.numbers, self.tables, self.images, self.trackers = name, {}, {}, {}, [self]
        self.log_with = [name]

    def log(self, values, step):
        self.numbers |= values

    def log_table(self, name, columns, data, step):
        self.tables[name] = [columns, *data]

    def log_images(self, images, step, **options):
        self.images |= images
        self.options = options


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "results", lambda self: dict(stages=dict(experts=EXPERTS, router=ROUTER)))
    Image.new("RGBA", (6, 4), (255, 0, 0, 255)).save(tmp_path / "curves.png")
    return RunFolder(tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_results_arrive_as_numbers(run, name):
    tracker = Tracker(name)
    log_results(tracker, run, step=5)
    texts = {key for key, value in tracker.numbers.items() if not isinstance(value, int | float)}
    assert texts == ({"results/table"} if name == "tensorboard" else set())
    found = {key: value for key, value in tracker.numbers.items() if key not in texts}
    shared = {"all": 50.0, "many": 60.0, "few": 40.0, "top5": 90.0}
    expected = {f"results/{stage}/{key}": value for stage in ("experts", "router") for key, value in shared.items()}
    expected |= {"results/experts/macs": 3000, "results/experts/epochs": 3}
    expected |= {"results/router/macs": 2000, "results/router/epochs": 2}
    assert found == expected | {"results/router/threshold": 0.5, "results/router/experts_used": 1.75}


def test_the_table_of_wandb_has_numbers_in_its_cells(run):
    tracker = Tracker("wandb")
    log_results(tracker, run, step=5)
    heading, experts, router = tracker.tables["results/table"]
    assert dict(zip(heading, experts, strict=True))["all"] == 50.0
    assert router == ["routed", 50.0, 60.0, None, 40.0, 90.0, 2000, 2, 0.5, 1.75]


def test_the_table_of_tensorboard_is_one_of_markdown(run):
    tracker = Tracker("tensorboard")
    log_results(tracker, run, step=5)
    lines = tracker.numbers["results/table"].splitlines()
    assert lines[0] == "|  | all | many | medium | few | top-5 | MMACs | experts used |"
    assert lines[-1] == "| routed | 50.00 | 60.00 | – | 40.00 | 90.00 | 0.0 | 50.0 / 25.0 / 25.0 % |"


@pytest.mark.parametrize(("name", "options"), [("tensorboard", dict(dataformats="NHWC")), ("wandb", {})])
def test_plots_are_batches_of_one_image(run, name, options):
    tracker = Tracker(name)
    log_results(tracker, run, step=5)
    assert tracker.images.keys() == {"plots/curves"} and tracker.options == options
    np.testing.assert_array_equal(tracker.images["plots/curves"], np.full((1, 4, 6, 3), (255, 0, 0), np.uint8))


def test_wandb_takes_numbers_table_and_plots_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from accelerate import Accelerator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(RunFolder, "results", lambda self: dict(stages=dict(experts=EXPERTS, router=ROUTER)))
    Image.new("RGB", (6, 4)).save(tmp_path / "curves.png")
    accelerator = Accelerator(cpu=True, log_with=["wandb", "tensorboard"], project_dir=tmp_path)
    run = RunFolder(tmp_path)
    start_trackers(accelerator, load_recipe("fashion_lt"), run)
    log_epoch(accelerator, dict(stage="experts", epoch=1, loss=0.5), step=1)
    log_results(accelerator, run, step=2)
    summary, config = dict(wandb.run.summary), dict(wandb.run.config)
    accelerator.end_training()
    assert summary["experts/loss"] == 0.5 and isinstance(config["lr"], float)
    (table,) = (tmp_path / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"][1] == ["routed", 50.0, 60.0, None, 40.0, 90.0, 2000, 2, 0.5, 1.75]
    (plot,) = (tmp_path / "wandb").rglob("plots/*.png")
    assert Image.open(plot).size == (6, 4) and list((tmp_path / "ride_timm").glob("events*"))

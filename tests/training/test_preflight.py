"""What a machine decides for a run, once for all processes, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from ride_timm import InputError
from ride_timm.training import preflight
from ride_timm.training.build import build_accelerator
from ride_timm.training.options import parse_arguments
from ride_timm.training.recipe import load_recipe


@pytest.fixture
def decide(monkeypatch, tmp_path):
    """The recipe that a machine without bf16 or a compiler makes of some flags."""
    monkeypatch.setattr(preflight, "bf16_pays", lambda: False)
    monkeypatch.setattr(preflight, "has_compiler", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def decide(*flags):
        options, recipe = parse_arguments(["--output", str(tmp_path), *flags])
        return preflight.adapt_to_machine(recipe, options)

    yield decide
    AcceleratorState._reset_state(True)


def test_bf16_only_where_it_pays_or_is_stated(decide, tmp_path, capsys):
    assert decide("--recipe", "cifar100_lt").mixed_precision == "no"
    assert "bf16 is not faster" in capsys.readouterr().err
    assert decide("--recipe", "cifar100_lt", "--mixed-precision", "bf16").mixed_precision == "bf16"
    for begun in ("bf16", "no"):  # a run keeps the precision it began with, under its recipe's name as well
        (tmp_path / "recipe.yaml").write_text(load_recipe("cifar100_lt").override({"mixed_precision": begun}).to_yaml())
        for flags in (["--resume"], ["--stage", "router"], ["--recipe", "cifar100_lt", "--resume"]):
            assert decide(*flags).mixed_precision == begun
    assert "bf16" not in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "noticed"), [("cifar100_lt", True), ("fashion_lt", False)])
def test_norms_are_fused_only_with_a_compiler(decide, capsys, recipe, noticed):
    assert not decide("--recipe", recipe).fused_norm
    assert ("no C++ compiler" in capsys.readouterr().err) == noticed


def test_fused_norms_that_were_asked_for_need_a_compiler(decide):
    options, recipe = parse_arguments(["--recipe", "cifar100_lt", "--fused-norm", "--mixed-precision", "no"])
    recipe = preflight.adapt_to_machine(recipe, options)
    with pytest.raises(InputError, match="fused_norm needs a C\\+\\+ compiler"):
        preflight.check_machine(recipe, options, build_accelerator(recipe, options))


UNLIKE = """
import json, os, sys
from ride_timm.training import preflight
from ride_timm.training.options import parse_arguments

rank = int(os.environ["RANK"])
preflight.bf16_pays = lambda: rank == 1
preflight.has_compiler = lambda: rank == 1
options, recipe = parse_arguments(["--recipe", "cifar100_lt", "--output", sys.argv[1]])
recipe = preflight.adapt_to_machine(recipe, options)
print(json.dumps([recipe.mixed_precision, recipe.fused_norm]))
"""


def test_unlike_machines_train_alike_and_print_each_notice_once(tmp_path):
    """The main process cannot do what the other one can."""
    shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29547")
    shared |= dict(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    shared |= dict(PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UNLIKE, str(tmp_path / "run")],
            env=os.environ | shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [json.loads(out) for out, _ in outputs] == [["no", False]] * 2, outputs
    assert [err.count("notice:") for _, err in outputs] == [2, 0]


@pytest.mark.parametrize("name", ["lr", "epochs", "decay_epochs", "auto_augment", "dataset"])
def test_trackers_get_numbers_as_numbers(name):
    from ride_timm.training.build import hyperparameters

    recipe = load_recipe("fashion_lt")
    value, given = getattr(recipe, name), hyperparameters(recipe)[name]
    assert given == (value if isinstance(value, int | float | str) else str(value))
    assert type(given) in (int, float, str, bool)

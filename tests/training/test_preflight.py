"""Recipes adapted to the machine, alike on all ranks, and the errors."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from two_ranks import run_two_ranks

from ride_timm import InputError
from ride_timm.training import preflight
from ride_timm.training.build import build_accelerator
from ride_timm.training.options import parse_arguments
from ride_timm.training.recipe import Recipe, load_recipe


@pytest.fixture
def decide(monkeypatch, tmp_path):
    """Adapt the recipe of some flags to a machine without bf16 and compiler."""
    monkeypatch.setattr(preflight, "bf16_pays", lambda: False)
    monkeypatch.setattr(preflight, "has_compiler", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def decide(*flags):
        options, recipe = parse_arguments(["--output", str(tmp_path), *flags])
        return preflight.adapt_to_machine(recipe, options)

    yield decide
    AcceleratorState._reset_state(True)


def test_bf16_only_where_it_is_faster_or_requested(decide, tmp_path, capsys):
    assert decide("--recipe", "cifar100_lt").mixed_precision == "no"
    assert "bf16 is not faster" in capsys.readouterr().err
    assert decide("--recipe", "cifar100_lt", "--mixed-precision", "bf16").mixed_precision == "bf16"
    for begun in ("bf16", "no"):  # resuming keeps the precision, also with --recipe
        (tmp_path / "recipe.yaml").write_text(load_recipe("cifar100_lt").override({"mixed_precision": begun}).to_yaml())
        for flags in (["--resume"], ["--stage", "router"], ["--recipe", "cifar100_lt", "--resume"]):
            assert decide(*flags).mixed_precision == begun
    assert "bf16" not in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "noticed"), [("cifar100_lt", True), ("fashion_lt", False)])
def test_norms_are_fused_only_with_a_compiler(decide, capsys, recipe, noticed):
    assert not decide("--recipe", recipe).fused_norm
    assert ("no C++ compiler" in capsys.readouterr().err) == noticed


def test_requested_fused_norms_need_a_compiler(decide):
    options, recipe = parse_arguments(["--recipe", "cifar100_lt", "--fused-norm", "--mixed-precision", "no"])
    AcceleratorState._reset_state(True)
    recipe = preflight.adapt_to_machine(recipe, options)
    with pytest.raises(InputError, match="fused_norm needs a C\\+\\+ compiler"):
        preflight.check_machine(recipe, options, build_accelerator(recipe, options))


def test_processes_that_do_not_find_each_other_are_refused(decide, monkeypatch):
    options, recipe = parse_arguments(["--recipe", "cifar100_lt", "--mixed-precision", "no"])
    accelerator = build_accelerator(recipe, options)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of `--multi_gpu` on a machine without GPUs
    with pytest.raises(InputError, match=r"2 processes were launched, .* set ACCELERATE_USE_CPU=true"):
        preflight.check_machine(recipe, options, accelerator)


@pytest.mark.parametrize(
    ("values", "ways"),
    [
        (dict(freeze_norm=True), "--backbone-weights or --from."),
        (dict(freeze="trunk"), "--backbone-weights or --from."),
        (dict(head_init="class_means"), "pass --backbone-pretrained or --backbone-weights."),
    ],
)
def test_what_only_trained_weights_have_is_not_kept_of_random_ones(values, ways, tmp_path):
    options, _ = parse_arguments(["--recipe", "cifar100_lt", "--output", str(tmp_path)])
    [(key, value)] = values.items()
    with pytest.raises(InputError, match=f"{key}={value} needs pretrained weights: .*{re.escape(ways)}"):
        preflight.check_source(Recipe(**values), options, None)


@pytest.mark.parametrize(
    ("values", "stage", "key"),
    [
        (dict(decouple="tau_norm"), "heads", "decouple=tau_norm"),
        (dict(head_init="class_means"), "experts", "head_init=class_means"),
    ],
)
def test_classifiers_without_a_vector_per_class_are_refused_before_training(values, stage, key):
    model = SimpleNamespace(experts=[SimpleNamespace(fc=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))])
    options = SimpleNamespace(stages=("experts", stage), source=None)
    with pytest.raises(InputError, match=rf"^{key}: a Sequential has no weight vector per class: pass --use-norm"):
        preflight.check_heads(Recipe(**values), options, model, None)
    preflight.check_heads(Recipe(), options, model, None)


RANK = """
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


def test_ranks_on_unequal_machines_agree(tmp_path):
    """Rank 0 lacks what rank 1 has; it prints each notice once."""
    outputs = run_two_ranks("-c", RANK, tmp_path / "run")
    assert [json.loads(out) for out, _ in outputs] == [["no", False]] * 2, outputs
    assert [err.count("notice:") for _, err in outputs] == [2, 0]

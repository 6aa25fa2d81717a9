"""Sharded training is training: two processes over gloo against one, through the whole script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.testing import assert_close

from ride_timm.checkpoint import RunFolder
from ride_timm.errors import InputError
from ride_timm.launch import exit_code
from ride_timm.recipe import load_recipe
from ride_timm.sharding import make_plugin

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
FSDP = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
# both halves of a batch of 18 are as large as a ghost batch, so that one process normalises what two do
RUN = ["--model", "test_ride_resnet", "--num-experts", "2", "--imb-type", "none", "--augment", "cifar"]
RUN += ["--threads", "1", "--epochs", "2", "--router-epochs", "1", "--warmup-epochs", "1", "--lr", "0.02"]
RUN += ["--batch-size", "18", "--router-batch-size", "18", "--eval-every", "2"]
RUN += ["--clip-grad", "1", "--gradient-accumulation", "2", "--mixed-precision", "no"]


def _two_processes(*flags, **environment):
    """The script under `torchrun`, sharded as FSDP's launcher would have it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29537"]
    command += [str(ROOT / "tests" / "fsdp_on_cpu.py"), *map(str, flags)]
    quiet = dict(HF_DATASETS_DISABLE_PROGRESS_BARS="1", ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1")
    environment = {**os.environ, **quiet, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def train(script):
    """The script in this process, alone."""
    threads = torch.get_num_threads()
    yield lambda *argv: exit_code(script.train, [str(part) for part in argv])
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def _assert_same_training(ours, theirs, **tolerance):
    mine, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert_close(mine, other, **tolerance)


def test_a_sharded_run_is_torn_resumed_and_equal_to_one_process(train, colours, tmp_path):
    """Also what is on disk after one epoch is whole: a single process goes on from it."""
    tolerance = dict(rtol=1e-3, atol=1e-4)
    flags = ["--dataset", colours, *RUN, "--ghost-batch", "9"]
    assert train(*flags, "--output", tmp_path / "one") == 0
    sharded = tmp_path / "sharded"
    torn = _two_processes(*flags, "--output", sharded, **FSDP, STOP_AFTER="2")  # the start and one epoch
    assert torn.returncode and "error: interrupted" in torn.stderr, torn.stderr
    state = RunFolder(sharded).state()
    assert (state["stage"], state["epoch"]) == ("experts", 1)
    moments = [values["momentum_buffer"].shape for values in state["optimizer"]["state"].values()]
    assert moments == [value.shape for name, value in state["model"].items() if name.endswith(("weight", "bias"))]
    shutil.copytree(sharded, tmp_path / "handed_over")
    done = _two_processes("--output", sharded, "--resume", "--threads", "1", **FSDP)
    assert done.returncode == 0, done.stderr
    assert RunFolder(sharded).results()["num_processes"] == 2
    _assert_same_training(sharded, tmp_path / "one", **tolerance)
    assert train("--output", tmp_path / "handed_over", "--resume", "--threads", "1") == 0
    _assert_same_training(tmp_path / "handed_over", tmp_path / "one", **tolerance)
    # and the comparison can fail: without ghost batches one process trains something else
    flags = ["--dataset", colours, *RUN, "--stage", "experts"]
    assert train(*flags, "--output", tmp_path / "whole_batch") == 0
    mean = "trunk.bn1.running_mean"
    ours, theirs = (load_file(tmp_path / name / "model.safetensors")[mean] for name in ("one", "whole_batch"))
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("environment", "values", "message"),
    [
        (dict(FSDP_VERSION="1"), {}, "set fsdp_version: 2"),
        (dict(FSDP_AUTO_WRAP_POLICY="SIZE_BASED_WRAP"), {}, "SIZE_BASED_WRAP"),
        (dict(FSDP_OFFLOAD_PARAMS="true"), {}, "fsdp_offload_params"),
        (dict(FSDP_ACTIVATION_CHECKPOINTING="true"), {}, "fsdp_activation_checkpointing"),
        (dict(ACCELERATE_USE_DEEPSPEED="true"), {}, "launched with DEEPSPEED"),
        ({}, dict(mixed_precision="fp16"), "mixed_precision=fp16"),
        ({}, dict(compile=True), "compile does not work with FSDP"),
        ({}, dict(ema_decay=0.999), "ema_decay does not work with FSDP"),
        ({}, dict(optimizer="lamb"), "optimizer=lamb"),
    ],
)
def test_what_does_not_go_together_is_one_clear_error(monkeypatch, environment, values, message):
    for name, value in {**FSDP, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        make_plugin(load_recipe("fashion_lt").override(values))


def test_fsdp_without_gpus_says_so_and_writes_nothing(monkeypatch, train, colours, tmp_path, capsys):
    for name, value in {**FSDP, "ACCELERATE_USE_CPU": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train("--dataset", colours, *RUN, "--output", tmp_path / "run") == 2
    assert "FSDP needs two or more GPUs" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_sync_bn_keeps_activations_that_timm_fuses_into_batch_norm(script):
    """On GPUs only it trains; in eval mode any machine can compare."""
    model = timm.create_model("ride", backbone="test_efficientnet", num_experts=2, num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    converted = script.convert_sync_batchnorm(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    assert_close(converted(images), expected)


def test_ghost_batches_go_with_neither_sync_bn_nor_compile():
    for other in ("sync_bn", "compile"):
        with pytest.raises(InputError, match=f"ghost_batch.*{other}|{other}.*ghost_batch"):
            load_recipe("cifar100_lt").override({"ghost_batch": 32, other: True})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations_and_the_readme_names_them(path):
    config = load_config_from_file(str(path))  # a key that it does not know is an error
    assert config.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(path.stem, 8)
    assert f"({path.name})" in (CONFIGS / "README.md").read_text()


def test_the_fsdp_configuration_is_one_that_is_accepted(monkeypatch):
    given = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp.yaml"), "train_accelerate.py"])
    args, *_ = _validate_launch_command(given)
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("ACCELERATE_USE", "FSDP_")):
            monkeypatch.setenv(name, value)
    plugin = make_plugin(load_recipe("imagenet_lt_swin_small"))
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.mixed_precision_policy.param_dtype is None

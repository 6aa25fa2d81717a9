"""The run folder and the loading of models."""

import errno
import json
import os
import platform
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from forked import Python
from journeys import damage, fill

from ride_timm import InputError, RunError, files
from ride_timm.evaluation import figures
from ride_timm.models.load import load_model
from ride_timm.training import run_folder, state
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.run_folder import RunFolder, provenance
from ride_timm.training.state import TrainingState

SHAPE = dict(input_size=(3, 28, 28), mean=(0.3,) * 3, std=(0.4,) * 3, crop_pct=1.0, interpolation="bilinear")
TINY = Recipe(model="test_ride_resnet", num_experts=2)


def _state(stage="experts", epoch=1, results=None):
    return TrainingState(stage=stage, epoch=epoch, results=results or {}, history=[dict(epoch=1, loss=0.5)])


def test_a_failed_torch_save_leaves_the_old_state(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.begin(TINY, TrainingState())
    folder.save(_state(epoch=1))

    def fails(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(RunError, match="could not be written"):
        folder.save(_state(epoch=2))
    assert folder.state().epoch == 1


def test_claim_of_a_new_folder_writes_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.claim(TINY, "both", resume=False, router_in_place=False) is None
    assert not folder.path.exists()


def test_existing_run_is_not_overwritten(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(TINY, _state())
    with pytest.raises(InputError, match=r"already holds a run: .*--resume.*--output"):
        folder.claim(TINY, "both", resume=False, router_in_place=False)
    assert folder.claim(TINY, "both", resume=True, router_in_place=False).epoch == 1
    with pytest.raises(InputError, match=r"disagrees .*: lr \(0\.1 there\), seed \(0 there\)\. Leave --recipe"):
        folder.claim(TINY.override({"lr": 0.2, "seed": 3}), "both", resume=True, router_in_place=False)


def test_a_run_without_a_finished_epoch_begins_anew_with_another_recipe(tmp_path):
    RunFolder(tmp_path).begin(TINY, TrainingState())
    other, folder = TINY.override(dict(batch_size=64)), RunFolder(tmp_path)
    assert folder.claim(other, "both", resume=False, router_in_place=False) is None
    folder.open(other, TrainingState(), resume=False)
    assert RunFolder(tmp_path).recipe() == other


def test_claim_rejects_foreign_folders_and_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no run"):
        RunFolder(tmp_path).claim(TINY, "both", resume=False, router_in_place=False)
    with pytest.raises(InputError, match="is a file: name a folder"):
        RunFolder(tmp_path / "thesis.txt").claim(TINY, "both", resume=False, router_in_place=False)


def test_router_stage_in_the_same_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=r"no stage one to start from.*--from"):
        folder.claim(TINY, "router", resume=False, router_in_place=True)
    folder.begin(TINY, TrainingState())
    folder.save(_state("experts", 3))
    with pytest.raises(InputError):
        folder.claim(TINY, "router", resume=False, router_in_place=True)
    folder.save(_state("router", 0, {"experts": {}}))
    other_gates = TINY.override({"pos_weight": 5, "router_epochs": 2})
    assert folder.claim(other_gates, "router", resume=False, router_in_place=True).stage == "router"
    with pytest.raises(InputError, match="disagrees"):
        folder.claim(TINY.override({"lr": 0.5}), "router", resume=False, router_in_place=True)


def test_router_on_another_runs_experts_resumes_as_router_only(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(TINY, TrainingState())
    folder.save(_state("router", 1))
    with pytest.raises(InputError, match=r"a router on other experts: resume it with --stage router --resume"):
        folder.claim(TINY, "both", resume=True, router_in_place=False)
    assert folder.claim(TINY, "router", resume=True, router_in_place=True).epoch == 1


@pytest.mark.parametrize("harm", [damage, lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink])
def test_a_damaged_state_falls_back_to_the_one_before_it(tmp_path, harm):
    folder = RunFolder(tmp_path / "run")
    folder.begin(TINY, TrainingState())
    for epoch in (1, 2):
        folder.save(_state(epoch=epoch))
    assert folder.state().epoch == 2 and folder.notice(folder.state(), True) is None
    harm(folder.path / "state.pt")
    assert folder.state().epoch == 1
    reason = "is missing" if harm is Path.unlink else "is not a readable state"
    assert re.search(rf"state\.pt {reason}.*resumes from the state before it", folder.notice(folder.state(), True))
    damage(folder.path / "state.previous.pt")
    with pytest.raises(InputError, match=r"is not a readable state.*choose another --output"):
        folder.state()


def test_a_state_of_another_version_is_no_damaged_one(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin(TINY, TrainingState())
    folder.save(_state(epoch=1))
    torch.save(vars(_state(epoch=2)) | dict(phase=1), tmp_path / "state.pt")
    with pytest.raises(InputError, match=r"state\.pt was written by another version .* has phase: resume the run with"):
        folder.state()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"stages": 5}', '{"stages": {"experts": 5}}'])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json is .*damaged"):
        RunFolder(tmp_path).table()


def test_a_damaged_state_does_not_replace_the_one_before_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(TINY, TrainingState())
    for epoch in (1, 2):
        folder.save(_state(epoch=epoch))
    last, previous = folder.path / "state.pt", folder.path / "state.previous.pt"
    damage(last)
    resumed = RunFolder(folder.path)
    resumed.claim(TINY, "both", resume=True, router_in_place=False)
    for epoch, before in ((2, 1), (3, 2)):  # the second save follows a good one
        resumed.save(_state(epoch=epoch))
        assert [TrainingState.read(path).epoch for path in (last, previous)] == [epoch, before]


def test_a_state_is_on_the_disk_before_it_is_read_back(tmp_path, monkeypatch):
    steps, fsync, check = [], os.fsync, state.check_archive
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file)))
    monkeypatch.setattr(state, "check_archive", lambda path: (steps.append("read"), check(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: steps.append("rename"))
    RunFolder(tmp_path).save(TrainingState())
    assert steps[:2] == ["fsync", "read"] and steps[-1] == "rename"


def test_a_state_that_reads_back_otherwise_does_not_replace_the_last(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.begin(TINY, TrainingState())
    folder.save(_state(epoch=1))
    save = torch.save

    def damaged(value, path):
        save(value, path)
        damage(path)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(RunError, match=r"state\.pt could not be written.*CRC-32"):
        folder.save(_state(epoch=2))
    assert folder.state().epoch == 1 and folder.notice(folder.state(), True) is None


@pytest.mark.parametrize(
    "name", [".owner", "state.pt", "recipe.yaml", "metrics.csv", "results.json", "model.safetensors", "config.json"]
)
def test_a_full_disk_is_one_error_and_leaves_the_last_files(disk, name, monkeypatch):
    model = timm.create_model("test_ride_resnet", num_experts=2, num_classes=5)

    def write_all(epoch):
        folder = RunFolder(disk / "run")
        folder.claim(TINY, "both", resume=True, router_in_place=False)
        folder.lock()
        folder.begin(TINY, _state(epoch=epoch))
        folder.export(model, SHAPE, tuple("abcde"))
        folder.write_results(TINY, torch.device("cpu"), {"experts": dict(all=float(epoch))})

    write_all(1)
    before = (disk / "run" / name).read_bytes()
    replacing = files.replacing

    def filling(path, keep=None):
        if path.name == name:
            fill(disk)
        return replacing(path, keep)

    with monkeypatch.context() as patched:
        patched.setattr(files, "replacing", filling)
        with pytest.raises(RunError, match=rf"{re.escape(name)} could not be written, is the disk full"):
            write_all(2)
    assert (disk / "run" / name).read_bytes() == before and not list((disk / "run").glob("*.partial"))
    assert RunFolder(disk / "run").state().epoch in (1, 2)
    (disk / "ballast").unlink()
    write_all(3)
    assert RunFolder(disk / "run").state().epoch == 3


def test_a_full_disk_leaves_the_last_plot(disk):
    pytest.importorskip("matplotlib")
    figure, _ = figures.panels(1, 1, 3, 2)
    figures.save(figure, disk / "curves.png")
    before = (disk / "curves.png").read_bytes()
    fill(disk)
    with pytest.raises(RunError, match=r"curves\.png could not be written, is the disk full"):
        figures.save(figure, disk / "curves.png")
    assert {path.name for path in disk.iterdir()} == {"ballast", "curves.png"}
    assert (disk / "curves.png").read_bytes() == before


def test_damaged_weights_are_neither_loaded_nor_finished(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin(TINY, TrainingState(results={"experts": {}}))
    folder.export(timm.create_model("test_ride_resnet", num_experts=2, num_classes=5), SHAPE, tuple("abcde"))
    folder.write_results(TINY, torch.device("cpu"), {"experts": {}})
    assert folder.has_finished(TINY, "experts") and load_model(tmp_path).num_classes == 5
    damage(tmp_path / "model.safetensors")
    by_timm = partial(timm.create_model, f"local-dir:{tmp_path}", pretrained=True)
    for use in (lambda: folder.has_finished(TINY, "experts"), lambda: load_model(tmp_path), by_timm):
        with pytest.raises(InputError, match=r"model\.safetensors is damaged: .* SHA-256"):
            use()


@pytest.mark.parametrize("router", [False, True])
def test_exported_weights_load_through_timm_and_load_model(tmp_path, router):
    torch.manual_seed(0)
    args = dict(num_experts=2, num_classes=5, router=router, top_choices_num=4)
    model = timm.create_model("test_ride_resnet", **args).to(memory_format=torch.channels_last).eval()
    folder = RunFolder(tmp_path / "run [1]*?#")
    folder.begin(TINY, TrainingState())
    folder.export(model, SHAPE, tuple("abcde"))
    images = torch.randn(4, 3, 28, 28)
    for loaded in (
        timm.create_model(f"local-dir:{folder.path}", pretrained=True).eval(),
        load_model(folder.path),
        load_model(f"local-dir:{folder.path}"),
    ):
        loaded.to(memory_format=torch.channels_last)
        assert torch.equal(loaded(images), model(images))
        assert (loaded.router is not None) == router
        assert loaded.pretrained_cfg["mean"] == [0.3] * 3
    config = json.loads((folder.path / "config.json").read_text())
    assert config["architecture"] == "test_ride_resnet" and config["label_names"] == list("abcde")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "could not be loaded|expected one with experts"),
        ("no_such_model", r"model 'no_such_model' could not be loaded"),
        ("local-dir:/does/not/exist", r"could not be loaded"),
    ],
)
def test_load_model_errors(spec, message):
    with pytest.raises(InputError, match=message):
        load_model(spec)


def test_load_model_of_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_results_have_their_provenance(tmp_path):
    folder = RunFolder(tmp_path / "run")
    recipe = load_recipe("fashion_lt")
    folder.begin(recipe, TrainingState())
    folder.write_results(recipe, torch.device("cpu"), {"experts": {"all": 1.0}}, num_processes=1)
    results = folder.results()
    assert results["recipe"] == "fashion_lt" and results["precision"] == "bf16" and results["device"].startswith("cpu")
    assert {"torch", "timm", "ride-timm"} <= set(results["versions"]) and "commit" in results
    assert set(provenance()) == {"commit", "versions"}


def test_uncommitted_changes_mark_the_commit_dirty(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *args], cwd=tmp_path, check=True)

    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "module.py"))
    (tmp_path / "module.py").write_text("1")
    assert provenance()["commit"] is None
    git("init", "-q")
    assert provenance()["commit"] is None  # untracked
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = provenance()["commit"]
    assert len(commit) == 40
    (tmp_path / "untracked").touch()
    assert provenance()["commit"] == commit
    (tmp_path / "module.py").write_text("2")
    assert provenance()["commit"] == f"{commit}+dirty"


def test_running_process_locks_its_folder(tmp_path):
    code = "import sys, time; from ride_timm.training.run_folder import RunFolder; folder = RunFolder(sys.argv[1])"
    code += "; folder.lock(); (folder.path / 'recipe.yaml').touch(); print('locked', flush=True); time.sleep(600)"
    other = Python("-c", code, tmp_path / "run")
    try:
        while other.stdout != "locked\n":
            assert other.exit_code is None, other.stderr
            time.sleep(0.05)
        for resume in (False, True):
            with pytest.raises(InputError, match=rf"run: process {other.pid} on {platform.node()} is training here"):
                RunFolder(tmp_path / "run").claim(TINY, "both", resume, router_in_place=False)
    finally:
        other.kill()
    (tmp_path / "run" / "recipe.yaml").unlink()
    folder = RunFolder(tmp_path / "run")
    assert folder.claim(TINY, "both", resume=False, router_in_place=False) is None
    folder.lock()
    folder.begin(TINY, TrainingState())
    assert folder.occupied


def test_of_two_runs_that_start_at_once_one_begins(tmp_path):
    first, second, third = (RunFolder(tmp_path / "run") for _ in range(3))
    for folder in (first, second, third):
        assert folder.claim(TINY, "both", resume=False, router_in_place=False) is None
    first.open(TINY, TrainingState(), resume=False)
    with pytest.raises(InputError, match=rf"process {os.getpid()} on .* is training here; choose another --output"):
        second.open(TINY, TrainingState(), resume=False)
    first._lock.release()  # its process has ended
    with pytest.raises(InputError, match="another run has begun here; choose another --output"):
        third.open(TINY, TrainingState(), resume=False)


@pytest.mark.skipif(sys.platform == "win32", reason="locks files otherwise")
def test_a_file_system_without_locks_is_a_notice(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    for resume in (False, True):  # after the first, as if its process had been killed
        folder = RunFolder(tmp_path / "run")
        folder.open(TINY, folder.claim(TINY, "both", resume, router_in_place=False) or TrainingState(), resume)
        lines = [line for line in capsys.readouterr().err.splitlines() if "locks" in line]
        assert lines == [f"notice: {folder.path} is on a file system without locks; start no second run there."]

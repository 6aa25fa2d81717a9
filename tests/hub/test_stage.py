"""Staging and verifying, without a Hub."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from card import main as card_main
from folder import HERE, Staged, parse_name
from publish import check_card, check_stamp
from release_files import TAG, set_json
from stage import main as stage_main
from stage import stage
from verify import main as verify_main
from verify import verify

from ride_timm import InputError
from ride_timm.cli.main import main as evaluate_main
from ride_timm.cli.process import exit_code
from ride_timm.training.recipe import load_recipe


def test_a_run_becomes_a_release(staged, run):
    assert {
        "model.safetensors",
        "config.json",
        "recipe.yaml",
        "results.json",
        "golden.safetensors",
        "classes.png",
    } <= set(staged.hashes())
    config = staged.json("config.json")
    assert config["sha256"] == staged.hashes()["model.safetensors"] and config["pretrained_cfg"]["tag"] == "own_data"
    found = verify(staged)
    assert found["golden"] < 1e-4 and found["files"] == staged.hashes() and found["measured"] is None
    model = timm.create_model(f"local-dir:{staged.path}", pretrained=True).eval()
    golden = safetensors.torch.load_file(staged.path / "golden.safetensors")
    torch.testing.assert_close(model(golden["input"]), golden["output"])
    for path in staged.path.iterdir():  # no places on this machine
        assert b"somebody" not in path.read_bytes() and str(run).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18.a1", "with NAME one of"),
        ("ride_resnet32", "with TAG in lower case"),
        ("ride_resnet32.../../etc", "with TAG in lower case"),
        ("test_ride_resnet.Own", "with TAG in lower case"),
    ],
)
def test_names(name, message):
    with pytest.raises(InputError, match=message):
        parse_name(name)


def halve(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def drop(path, key):
    """Write a JSON file without a key, which may be one within another: a.b."""
    found = whole = json.loads(path.read_text())
    *parents, key = key.split(".")
    for parent in parents:
        found = found[parent]
    del found[key]
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "results.json").unlink(), r"has no results\.json: expected the folder of a fini"),
        (lambda path: set_json(path / "config.json", architecture="ride_resnet50"), "holds a ride_resnet50, not a"),
        (lambda path: halve(path / "results.json"), r"run/results\.json cannot be read \(JSON.*: copy it again"),
        (lambda path: halve(path / "config.json"), r"run/config\.json cannot be read \(JSON.*: copy it again"),
        (lambda path: (path / "results.json").write_text("[]"), r"results\.json holds a list, expected an object"),
        (lambda path: drop(path / "results.json", "stages"), r"results\.json lacks stages: copy it again"),
        (lambda path: (path / "recipe.yaml").write_bytes(b"\xff"), r"recipe\.yaml is not UTF-8 text: copy it again"),
    ],
)  # fmt: skip
def test_sources_that_are_none(run, tmp_path, damage, message):
    source = Path(shutil.copytree(run, tmp_path / "run"))
    damage(source)
    with pytest.raises(InputError, match=message):
        stage(source, TAG, tmp_path / "hub")
    assert not list((tmp_path / "hub").iterdir())  # nothing half-written


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: halve(path / "results.json"), r"results\.json cannot be read \(JSON.*: copy it again"),
        (lambda path: (path / "results.json").unlink(), r"has no results\.json: expected the folder of a finished run"),
        (lambda path: (path / "recipe.yaml").unlink(), r"has no recipe\.yaml: expected the folder of a finished run"),
        (lambda path: (path / "recipe.yaml").write_bytes(b"\xff"), r"recipe\.yaml is not UTF-8 text: copy it again"),
    ],
)
def test_seeds_that_are_none(run, make_run, tmp_path, damage, message):
    other = Path(shutil.copytree(make_run(seed=1), tmp_path / "other"))
    damage(other)
    with pytest.raises(InputError, match=message):
        stage(run, TAG, tmp_path / "hub", seeds=(other,))


@pytest.mark.parametrize("as_seed", [False, True])
@pytest.mark.parametrize(
    ("commit", "message"),
    [
        ("0123456789ab+dirty", r"uncommitted changes \(commit 0123456789ab\+dirty\).*: commit them"),
        (None, "outside a git clone.*: train again from a clone"),
    ],
)
def test_runs_of_code_in_no_commit_are_refused(run, make_run, tmp_path, as_seed, commit, message):
    dirty = Path(shutil.copytree(make_run(seed=1, router=True, top_choices_num=3), tmp_path / "dirty"))
    set_json(dirty / "results.json", commit=commit)
    with pytest.raises(InputError, match=message):
        stage(run if as_seed else dirty, TAG, tmp_path / "hub", seeds=(dirty,) if as_seed else ())
    assert not list((tmp_path / "hub").iterdir())


def test_the_time_of_the_weights_that_training_started_from(make_run, tmp_path):
    first, second, third = (Path(shutil.copytree(make_run(), tmp_path / name)) for name in "abc")  # 125 s each
    set_json(second / "results.json", source=str(first))
    set_json(third / "results.json", source=str(second))
    staged = stage(third, TAG, tmp_path / "hub")
    assert staged.json("results.json")["source_seconds"] == 250
    assert stage(staged.path, TAG, tmp_path / "hub").json("results.json")["source_seconds"] == 250
    set_json(first / "results.json", source="hf-hub:somebody/beetles")
    assert "source_seconds" not in stage(third, TAG, tmp_path / "hub").json("results.json")
    set_json(first / "results.json", source="ride_resnet32.fashion_lt")  # staged in hub/
    fashion = Staged.find("ride_resnet32.fashion_lt", HERE).json("results.json")["seconds"]
    assert stage(third, TAG, tmp_path / "hub").json("results.json")["source_seconds"] == 250 + fashion


def test_a_half_trained_router_is_not_released(make_run, tmp_path):
    source = Path(shutil.copytree(make_run(), tmp_path / "run"))
    (source / "metrics.csv").write_text("stage,epoch,loss\nexperts,3,0.5\nrouter,1,0.4\n")
    with pytest.raises(InputError, match=r"stage router of the run in .* is not finished: finish it by --resume"):
        stage(source, TAG, tmp_path / "hub")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_released_files_follow_the_umask(run, tmp_path, umask):
    before = os.umask(umask)
    try:
        staged = stage(run, TAG, tmp_path / "hub")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in staged.path.iterdir()} == {0o666 & ~umask}
    assert staged.path.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_registered_tag_has_its_own_classes(run, tmp_path):
    with pytest.raises(InputError, match=r"has 4 classes, the tag test_ride_resnet\.untrained has 1000"):
        stage(run, "test_ride_resnet.untrained", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "public"),
    [
        ("/home/somebody/my images (é) v2", "my_images_é_v2"),
        ("my images [new]+more", "my_images_new_more"),  # from another folder than the one where it was trained
        ("data/own/beetles/", "beetles"),
        ("~/.beetles-", "beetles"),
        ("/home/somebody/(+)", "local_images"),
        (".", "local_images"),
        ("owner/beetles.v2", "owner/beetles.v2"),
        ("cifar100", "cifar100"),
    ],
)
def test_a_folder_of_any_name_can_be_released(run, tmp_path, dataset, public):
    source = Path(shutil.copytree(run, tmp_path / "run"))
    recipe = dataclasses.replace(load_recipe(source / "recipe.yaml"), dataset=dataset)
    (source / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    staged = stage(source, TAG, tmp_path / "hub")
    assert staged.recipe().dataset == staged.json("results.json")["data"]["dataset"] == public
    verify(staged)
    check_stamp(staged)


def test_a_card_names_the_owner_that_it_is_staged_for(run, tmp_path):
    assert stage_main([str(run), TAG, "--root", str(tmp_path), "--namespace", "alice"]) is None
    card = (tmp_path / TAG / "README.md").read_text(encoding="utf-8")
    assert f'create_model("hf-hub:alice/{TAG}"' in card and f'model="alice/{TAG}"' in card
    staged = Staged.find(TAG, tmp_path)
    check_card(staged, f"alice/{TAG}")
    with pytest.raises(InputError, match=rf"names alice/{TAG}, not bob/{TAG}: .*--namespace bob"):
        check_card(staged, f"bob/{TAG}")
    with pytest.raises(InputError, match=rf"names no repository, not bob/{TAG}: .*--namespace bob"):
        check_card(stage(run, TAG, tmp_path), f"bob/{TAG}")


def test_without_the_test_set_a_release_has_no_curve_and_says_so(run, tmp_path, capsys):
    assert "routing" not in stage(run, TAG, tmp_path).json("results.json")
    assert "notice: no test set here, so the release has no curve of the router: pass --data-dir" in (
        capsys.readouterr().err
    )


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip_a_bit(path / "model.safetensors"), r"does not have the sha256 that config\.json states"),
        (lambda path: flip_a_bit(path / "golden.safetensors"), r"golden"),
        (lambda path: (path / "golden.safetensors").write_bytes(b"x"), "is not a golden pair"),
        (lambda path: set_json(path / "results.json", seconds=1), "is not the card of its data"),
        (lambda path: set_json(path / "results.json", source="/home/somebody/run"), "expected a release"),
        (
            lambda path: (path / "results.json").write_text("{}"),
            r"results\.json lacks .*stages: stage it",
        ),
        (lambda path: (path / "results.json").write_text("[]"), r"results\.json holds a list, expected an object: "),
        (
            lambda path: halve(path / "results.json"),
            r"results\.json cannot be read \(JSON.*: stage it again",
        ),
        (lambda path: drop(path / "results.json", "network"), r"results\.json lacks network: stage it again"),
        (
            lambda path: drop(path / "results.json", "stages.router.macs"),
            r"lacks stages\.router\.macs: stage it",
        ),
        (lambda path: drop(path / "config.json", "architecture"), r"config\.json lacks architecture: stage it"),
        (
            lambda path: drop(path / "config.json", "pretrained_cfg"),
            r"lacks pretrained_cfg\.input_size, pretr",
        ),
        (
            lambda path: drop(path / "config.json", "pretrained_cfg.mean"),
            r"lacks pretrained_cfg\.mean: stage it",
        ),
        (
            lambda path: (path / "README.md").write_bytes(b"\xff"),
            r"README\.md is not the card of its data: python hub/card\.py",
        ),
        (lambda path: (path / "recipe.yaml").write_bytes(b"\xff"), r"recipe\.yaml is not UTF-8 text: stage it again"),
        (lambda path: (path / "model.pth").write_bytes(b"x"), r"model\.pth does not belong to a release"),
        (lambda path: (path / "curves.png").symlink_to("/etc/passwd"), r"curves\.png does not belong"),
        (lambda path: (path / "more").mkdir(), "more does not belong"),
        (lambda path: (path / "README.md").unlink(), r"has no README\.md"),
        (lambda path: (path / "recipe.yaml").write_text("module: os\n"), "unknown key module"),
        (lambda path: (path / "recipe.yaml").write_text("dataset: /etc\n"), "names local data"),
        (lambda path: (path / "recipe.yaml").write_text("data_dir: ../..\n"), "names local data"),
        (lambda path: (path / "recipe.yaml").write_text("annotations: /etc\n"), r"names local data \(annotations"),
    ],
)
def test_verify_notices(staged, damage, message, capsys):
    verify(staged)
    damage(staged.path)
    assert exit_code(verify_main, [TAG, "--root", str(staged.path.parent)]) == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(InputError):  # nor can it be published
        check_stamp(staged)


@pytest.mark.parametrize("text", ["", "[]", '{"files": []}', '{"files": null}', '{"golden": 0}'])
def test_a_damaged_stamp_is_none(staged, text):
    verify(staged)
    (staged.path / "verified.json").write_text(text)
    with pytest.raises(InputError, match=r"verified\.json is missing or damaged: python hub/verify\.py"):
        check_stamp(staged)
    verify(staged)
    check_stamp(staged)


@pytest.mark.parametrize("flags", [[], ["--measure"], ["--recipe", "cifar100_lt"]])
def test_a_run_is_not_passed_for_a_checkpoint_when_its_recipe_is_lost(staged, flags, capsys):
    """Rendered without the recipe, its card said that it came from the authors' code."""
    (staged.path / "recipe.yaml").unlink()
    before = (staged.path / "README.md").read_bytes()
    command = [TAG, "--root", str(staged.path.parent)]
    for tried in (lambda: exit_code(verify_main, [*command, *flags]), lambda: exit_code(card_main, command)):
        assert tried() == 2
        assert "recipe.yaml is missing, but results.json names recipe 'beetles': stage" in capsys.readouterr().err
    assert (staged.path / "README.md").read_bytes() == before


@pytest.mark.parametrize("spec", ["/home/somebody/teacher", "ride_resnet32.cifar100_lt100"])
def test_the_teacher_of_a_run_is_named_by_the_hash_of_its_weights(make_run, tmp_path, spec):
    run, digest = make_run(seed=3, router=True, top_choices_num=3), "ab" * 32
    set_json(run / "results.json", teacher=dict(spec=spec, sha256=digest))
    release = stage(run, TAG, tmp_path / "hub")
    public = None if "somebody" in spec else spec
    assert release.json("results.json")["teacher"] == dict(spec=public, sha256=digest)
    (row,) = (line for line in (release.path / "README.md").read_text().splitlines() if line.startswith("| teacher"))
    assert digest[:12] in row and "somebody" not in row and (public or "") in row


def test_a_recipe_is_data(staged):
    """YAML tags that would build objects are refused."""
    for text in ("name: !!python/object/apply:os.system ['true']\n", "model: !!python/name:os.system\n"):
        (staged.path / "recipe.yaml").write_text(text)
        with pytest.raises(InputError, match="is not valid YAML: line 1: tag !!python/"):
            load_recipe(staged.path / "recipe.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "data_dir: /home/somebody\n",
        "dataset: /etc\n",
        "dataset: ../secret\n",
        "dataset: a/../../b\n",
        "annotations: lists\n",
    ],
)
def test_a_downloaded_recipe_names_no_place_on_this_disk(staged, text):
    (staged.path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match="is of a release and names local files"):
        evaluate_main(["evaluate", "--model", str(staged.path)])

"""Fine-tuning of a pretrained backbone by the training script, on image files."""

import json

import pytest
import timm
import torch
from class_folders import write_class_folders
from journeys import rows_of, stop_after_epoch
from safetensors.torch import load_file, save_file
from small_backbones import lively

from ride_timm.cli.main import main
from ride_timm.errors import InputError
from ride_timm.training import options
from ride_timm.training.options import parse_arguments, recipe_for

BACKBONE = "test_convnext"
SMALL = ["--backbone", BACKBONE, "--input-size", "64", "--batch-size", "8", "--router-epochs", "1", "--workers", "0"]
SMALL += ["--threads", "1", "--mixed-precision", "no", "--split", "stages.3", "--num-experts", "3"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs of 60 x 80 pixels by split and class, with a tail."""
    counts = dict(train=(16, 8, 4), test=(4, 4, 4))
    return write_class_folders(tmp_path_factory.mktemp("photos"), counts, (60, 80), "flower", ".jpg")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the backbone, as timm saves them, with its 1000 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / f"{BACKBONE}.safetensors"
    save_file(timm.create_model(BACKBONE).state_dict(), path)
    return path


def flags_of(photos, weights, output, *more):
    return ["--dataset", photos, "--backbone-weights", weights, "--output", output, *SMALL, *more]


def test_the_obvious_command_fine_tunes_and_says_so(train, photos, weights, tmp_path, capsys):
    output = tmp_path / "run"
    flags = [flag for flag in flags_of(photos, weights, output) if flag not in ("--num-experts", "3")]
    assert train([*flags, "--epochs", "2", "--eval-every", "1"]) == 0
    noise = capsys.readouterr().err
    assert noise.count(f"notice: dataset={photos}: recipe finetune") == 1
    results = json.loads((output / "results.json").read_text())
    assert results["class_counts"] == [16, 8, 4] and set(results["stages"]) == {"experts"}
    config = json.loads((output / "config.json").read_text())["pretrained_cfg"]
    theirs = timm.get_pretrained_cfg(BACKBONE)
    assert (config["mean"], config["std"]) == (list(theirs.mean), list(theirs.std))
    assert (config["interpolation"], config["crop_pct"]) == (theirs.interpolation, theirs.crop_pct)
    assert config["input_size"] == [3, 64, 64]
    assert [row["all"] != "" for row in rows_of(output)] == [True] * 2
    main(["evaluate", "--model", f"local-dir:{output}", "--json", "--threads", "1"])
    assert json.loads(capsys.readouterr().out)["all"] == results["stages"]["experts"]["all"]


def test_a_resumed_run_is_bit_equal_without_the_weights_file(train, photos, weights, tmp_path, monkeypatch):
    whole, cut, copied = tmp_path / "whole", tmp_path / "cut", tmp_path / f"{BACKBONE}.safetensors"
    copied.write_bytes(weights.read_bytes())
    more = ("--epochs", "2", "--stage", "experts", "--ema-decay", "0.9", "--mixup-alpha", "0.2")
    assert train(flags_of(photos, weights, whole, *more)) == 0
    with monkeypatch.context() as patched:
        stop_after_epoch(patched)
        assert train(flags_of(photos, copied, cut, *more)) == 143
    copied.unlink()
    assert train(["--output", cut, "--resume", "--stage", "experts", "--workers", "0", "--threads", "1"]) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("freeze", "kept"), [("trunk", ("trunk.",)), ("backbone", ("trunk.", ".stages."))])
def test_frozen_weights_are_the_pretrained_ones(train, photos, weights, tmp_path, freeze, kept):
    more = ["--epochs", "1", "--freeze", freeze, "--stage", "experts", "--recipe", "finetune"]
    if freeze == "backbone":
        more += ["--layer-decay", "none"]
    assert train(flags_of(photos, weights, tmp_path / "run", *more)) == 0
    tensors, theirs = load_file(tmp_path / "run" / "model.safetensors"), load_file(weights)
    for name, value in tensors.items():
        native = name.split(".net.")[-1]
        frozen = any(part in name for part in kept)
        assert torch.equal(value, theirs[native]) == frozen if native in theirs else ".fc." in name


def test_recomputed_activations_and_frozen_norms_leave_a_run_as_it_is(train, photos, tmp_path, monkeypatch):
    """Bit by bit the same weights with less memory; each BatchNorm has the statistics that it came with."""
    file, tensors, calls, checkpoint = tmp_path / "weights.safetensors", [], [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    save_file(lively("test_resnet").state_dict(), file)
    more = ["--recipe", "finetune", "--backbone", "test_resnet", "--split", "layer4", "--num-experts", "1"]
    more += ["--epochs", "1"]
    for name, flag in (("plain", "--no-grad-checkpointing"), ("recomputed", "--grad-checkpointing")):
        assert train(flags_of(photos, file, tmp_path / name, *more, flag)) == 0
        tensors.append(load_file(tmp_path / name / "model.safetensors"))
        assert bool(calls) == (name == "recomputed")
    theirs = load_file(file)
    for name, value in tensors[0].items():
        assert torch.equal(value, tensors[1][name]), name
        if (native := name.split(".net.")[-1]) in theirs:
            assert torch.equal(value, theirs[native]) == ("running_" in name or "num_batches" in name), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backbone-weights", "nothing.safetensors"], "nothing.safetensors': no such file"),
        (["--input-size", "8"], "does not take images of 8 x 8 pixels"),
        (["--backbone", "test_vit", "--split", "none"], "lack"),
        (
            ["--backbone-weights", "none", "--no-backbone-pretrained"],
            "freeze_norm=True, head_init=class_means need pretrained weights: pass --backbone-p",
        ),
        (["--freeze", "backbone", "--layer-decay", "0.7"], "freeze=backbone leaves layer_decay=0.7 without effect"),
        (["--backbone", "resnt50"], "backbone='resnt50'"),
        (["--model", "ride", "--recipe", "finetune", "--backbone-weights", "none"], "--backbone-weights FILE"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(train, photos, weights, tmp_path, capsys, flags, words):
    output = tmp_path / "run"
    assert train([*flags_of(photos, weights, output, "--epochs", "1"), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        (dict(), "fashion_lt"),
        (dict(dataset="fashion_lt"), "fashion_lt"),
        (dict(dataset="cifar100"), "cifar100_lt"),
        (dict(dataset="cifar10"), "cifar10_lt"),
        (dict(dataset="imagenet_lt"), "imagenet_lt_resnet50"),
        (dict(dataset="inat18"), "inat18_resnet50"),
        (dict(dataset="places_lt"), "finetune"),
        (dict(dataset="PHOTOS"), "finetune"),
        (dict(dataset="PHOTOS", model="ride"), "finetune"),
        (dict(dataset="PHOTOS", model="ride_resnet50"), "imagenet_lt_resnet50"),
        (dict(dataset="PHOTOS", model="ride_resnet32"), "fashion_lt"),  # a network for 32 pixels
        (dict(dataset="COLOURS"), "fashion_lt"),
    ],
)
def test_the_recipe_of_a_data_set(flags, recipe, photos, colours):
    folders = dict(PHOTOS=str(photos), COLOURS=str(colours))
    flags = {key: folders.get(value, value) for key, value in flags.items()}
    chosen, _, notices = recipe_for(flags)
    assert chosen == recipe
    own = "photos" in str(flags) or "colours" in str(flags)
    assert [f"recipe {recipe}" in notice for notice in notices] == [True] * (own or recipe != "fashion_lt")


@pytest.mark.parametrize(
    ("flags", "augment", "size"),
    [
        (["COLOURS"], "cifar", 32),
        (["PHOTOS", "--model", "ride_resnet50"], "imagenet", 224),
        (["PHOTOS", "--model", "ride_resnet32"], "cifar", 32),
        (["PHOTOS"], "backbone", 224),
    ],
)
def test_images_of_ones_own_are_all_kept_at_a_mean_that_fits(flags, augment, size, photos, colours):
    folders = dict(PHOTOS=str(photos), COLOURS=str(colours))
    _, recipe = parse_arguments(["--dataset", *(folders.get(flag, flag) for flag in flags)])
    assert (recipe.augment, recipe.policy.input_size(recipe.input_size), recipe.profile) == (augment, size, "none")


def test_a_named_recipe_is_kept(photos):
    _, recipe = parse_arguments(["--dataset", str(photos), "--recipe", "fashion_lt"])
    assert recipe.name == "fashion_lt"


def test_the_images_looked_at_are_those_of_the_named_configuration(monkeypatch):
    seen = {}
    monkeypatch.setattr(options, "first_image_size", lambda dataset, **places: seen.update(places) or (32, 32))
    place = dict(dataset_config="small", dataset_revision="v1")
    assert recipe_for(dict(dataset="owner/birds", **place))[0] == "fashion_lt"
    assert seen == place


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--backbone", "resnet18"], "backbone=resnet18"),
        (["--backbone-weights", "resnet18.pth"], "backbone_weights=resnet18.pth"),
        (["--backbone-pretrained"], "backbone_pretrained=True"),
    ],
)
def test_a_backbone_without_the_network_that_cuts_it_is_refused(flags, named, colours):
    with pytest.raises(
        InputError, match=f"^{named} is for the model ride, .* not for ride_resnet32: .* --recipe finetune"
    ):
        parse_arguments(["--dataset", str(colours), *flags])

"""Predictions of the demo: equal to the model's, routed as by the router; files that are not images."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from commands import CLASSES, run_folder
from PIL import Image
from release_files import set_json
from timm.data import create_transform, resolve_model_data_config

from ride_timm import InputError
from ride_timm.inference.demo.opinions import OWN, TOP, load_demo


@pytest.fixture(scope="module")
def demo(run):
    return load_demo(str(run), "cpu")


@pytest.fixture(scope="module")
def outputs(run, photo):
    """The model and the image, transformed."""
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return model, transform(Image.open(photo).convert("RGB"))[None]


def matches(candidates, logits, counts, most):
    values, indices = logits.softmax(0).topk(most)
    found = [(c.label, c.train_images) for c in candidates]
    assert found == [(CLASSES[i], counts[i] if counts else None) for i in indices.tolist()]
    np.testing.assert_allclose([c.probability for c in candidates], values.numpy(), rtol=1e-5)


def test_opinions_are_the_models(demo, outputs, photo):
    model, image = outputs
    opinions = demo.predict(photo)
    with torch.inference_mode():
        logits = model.forward_experts(image)[1][0]
        matches(opinions.ensemble, model(image)[0], demo.train_images, TOP)
    assert len(opinions.experts) == model.num_experts
    for own, expected in zip(opinions.experts, logits, strict=True):
        matches(own, expected, demo.train_images, OWN)


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.75, 1.0])
def test_the_router_decides_as_the_model_does(demo, outputs, photo, quantile):
    model, image = outputs
    with torch.inference_mode():
        gates = model.router(*model.forward_experts(image)).sigmoid()[0].sort().values
        low, high = gates[0] - 0.01, gates[-1] + 0.01
        threshold = float(low + quantile * (high - low))
        logits, used = model.forward_routed(image, threshold)
    routed = demo.predict(photo, threshold).routed
    assert routed.experts_used == used.item()
    matches([routed.best], logits[0], demo.train_images, 1)
    cost = demo.macs.trunk + sum(demo.macs.experts[: used.item()]) + sum(demo.macs.gates[: used.item()])
    assert routed.macs == pytest.approx(cost) and routed.saved == pytest.approx(1 - cost / demo.macs.ensemble)


def test_settings_are_those_of_the_curve_and_the_models_own(demo):
    assert [point["threshold"] for point in demo.settings] == [1.0, 0.5, 0.25]
    assert [point["all"] for point in demo.settings] == [40.0, 44.0, 45.5]
    assert demo.default == 1 and demo.settings[0]["few"] is None
    assert demo.accuracy == 46.0 and demo.dataset == "fashion_lt"


def test_the_accuracy_is_that_of_re_balanced_heads(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    stages = json.loads((folder / "results.json").read_text())["stages"]
    set_json(folder / "results.json", stages=stages | dict(heads=dict(all=48.0)))
    assert load_demo(str(folder), "cpu").accuracy == 48.0


def test_a_run_that_was_not_measured(bare_run, photo):
    demo = load_demo(str(bare_run), "cpu")
    thresholds = [point["threshold"] for point in demo.settings]
    assert thresholds == [i / 20 for i in range(20, -1, -1)] and thresholds[demo.default] == 0.5
    assert all(point["all"] is None for point in demo.settings)
    assert demo.predict(photo).ensemble[0].train_images is None


def test_a_network_without_a_router_or_names(tmp_path, photo):
    path = run_folder(tmp_path / "run", num_classes=3, router=False)
    config = json.loads((path / "config.json").read_text())
    config.pop("label_names")
    (path / "config.json").write_text(json.dumps(config))
    demo = load_demo(str(path), "cpu")
    opinions = demo.predict(photo)
    assert demo.settings == () and opinions.routed is None
    assert {candidate.label for candidate in opinions.ensemble} == {"0", "1", "2"}


def test_the_examples_are_those_of_the_release(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "release")
    examples = [dict(file=name) for name in ("example_head.png", "../example_tail.png", "gone.png")]
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | dict(examples=examples)))
    for name in ("example_head.png", "example_tail.png"):
        (folder / name).touch()
        (tmp_path / name).touch()
    found = load_demo(f"local-dir:{folder}").examples
    assert found == (folder / "example_head.png", folder / "example_tail.png")  # none outside of it


@pytest.mark.parametrize("name", ["words.png", "empty.jpg", "cut.png", "drawing.svg", "missing.png"])
def test_files_that_are_not_images(demo, photo, tmp_path, name):
    contents = {"words.png": b"hello", "empty.jpg": b"", "cut.png": photo.read_bytes()[:200], "drawing.svg": b"<svg/>"}
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(InputError, match=rf"^{name} cannot be read as an image \(.*\): expected PNG") as refusal:
        demo.predict(tmp_path / name)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_images_of_other_modes(demo, tmp_path, mode):
    path = tmp_path / "image.tiff"
    Image.new(mode, (31, 17)).save(path)
    assert len(demo.predict(path).ensemble) == TOP


@pytest.mark.parametrize(
    "spoil",
    [
        lambda results: results | dict(class_counts=[1, 2]),
        lambda results: results | dict(routing=dict(curve=[dict(macs=1.0)])),
        lambda results: results | dict(routing=dict(curve=[dict(threshold="high")])),
        lambda results: results | dict(stages=[]),
        lambda results: [results],
    ],
)
def test_damaged_results(run, tmp_path, spoil):
    path = shutil.copytree(run, tmp_path / "run")
    results = json.loads((path / "results.json").read_text())
    (path / "results.json").write_text(json.dumps(spoil(results)))
    with pytest.raises(InputError, match=r"results\.json is damaged .*: copy it again"):
        load_demo(str(path), "cpu")


def test_images_of_other_channels(tmp_path):
    model = timm.create_model("test_ride_resnet", in_chans=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(InputError, match=r"takes 4 channels: image files have 1 \(grey\) or 3"):
        load_demo(str(tmp_path), "cpu")

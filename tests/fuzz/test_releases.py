"""Releases from anyone: config.json, the header of the weights, and the manifest of an ONNX export."""

import json
import shutil
from contextlib import suppress

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import altered, damaged

from ride_timm import InputError
from ride_timm.models import Ride
from ride_timm.models.load import load_any_model
from ride_timm.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release")
    model = timm.create_model("test_ride_resnet", num_classes=4, num_experts=2, router=True)
    RunFolder(folder).export(model, dict(input_size=(3, 64, 64)), ("a", "b", "c", "d"))
    return folder


def _copy(release, tmp_path_factory, name):
    return shutil.copytree(release, tmp_path_factory.getbasetemp() / name, dirs_exist_ok=True)


def _load(folder, harmless):
    with harmless():
        try:
            model = load_any_model(folder)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(model, Ride) and model(torch.zeros(1, model.in_chans, 64, 64)).shape[0] == 1


@pytest.mark.filterwarnings("ignore")
@given(draw=st.data())
def test_configs(draw, release, tmp_path_factory, harmless):
    folder = _copy(release, tmp_path_factory, "config")
    text = (release / "config.json").read_text()
    config = draw.draw(st.one_of(altered(json.loads(text)).map(json.dumps).map(str.encode), damaged(text.encode())))
    (folder / "config.json").write_bytes(config)
    _load(folder, harmless)


@pytest.mark.filterwarnings("ignore")
@given(draw=st.data())
def test_headers_of_weights(draw, release, tmp_path_factory, harmless):
    folder = _copy(release, tmp_path_factory, "weights")
    data = (release / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if draw.draw(st.booleans()):
        header = json.dumps(draw.draw(altered(json.loads(header)))).encode()
        data = len(header).to_bytes(8, "little") + header + rest
    else:
        data = draw.draw(damaged(data[: 8 + size])) + rest
    (folder / "model.safetensors").write_bytes(data)
    _load(folder, harmless)


MANIFEST = dict(
    kind="driver", num_experts=2, num_classes=3, threshold=0.5, labels=["a", "b", "c"], input_size=[3, 8, 8]
)


@given(manifest=st.one_of(altered(MANIFEST).map(json.dumps).map(str.encode), damaged(json.dumps(MANIFEST).encode())))
def test_manifests(manifest, tmp_path_factory, harmless):
    onnx_driver = pytest.importorskip("ride_timm.inference.onnx_driver")
    folder = tmp_path_factory.getbasetemp() / "manifest"
    folder.mkdir(exist_ok=True)
    for name in ("trunk", "expert_1", "expert_2", "gate_1"):
        (folder / f"{name}.onnx").touch()
    (folder / "manifest.json").write_bytes(manifest)
    opened = []
    with pytest.MonkeyPatch.context() as patched, harmless(), suppress(ValueError):
        patched.setattr(onnx_driver, "load_session", lambda path, threads: opened.append(path))
        driver = onnx_driver.OnnxRouted(folder)
        assert 0 <= driver.threshold <= 1 and len(driver.experts) == len(driver.gates) + 1
    assert len(opened) < 1000 and all(path.parent == folder for path in opened)

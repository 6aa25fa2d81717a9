import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.errors import InputError, RunError
from ride_timm.inference import export as export_module
from ride_timm.inference.export import export
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("test_ride_resnet", num_classes=7, router=True).eval()
    with torch.no_grad():
        for hidden in model.router.hidden:
            hidden.weight.normal_(0, 2)
        model.router.fc[0].bias -= model.router(*model.forward_experts(torch.randn(40, 3, 32, 32))).median()
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(17, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, model):
    root = tmp_path_factory.mktemp("exported")
    return {kind: export(model, root / kind, kind, threshold=0.4, size=32) for kind in ("none", "masked", "driver")}


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_the_ensemble(folders, model, images, batch):
    with torch.no_grad():
        expected = model(images[:batch])
    (logits,) = session(folders["none"] / "model.onnx").run(None, {"images": images[:batch].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["masked", "driver"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_routing(folders, model, images, kind, threshold):
    from ride_timm.inference.onnx_driver import OnnxRouted

    if kind == "masked":
        graph = session(folders[kind] / "model.onnx")
        number = np.array(threshold, dtype=np.float32)
    else:
        driver = OnnxRouted(folders[kind], threshold)
    kinds = set()
    for batch in (1, 3, 17):
        with torch.no_grad():
            expected, expected_used = model.forward_routed(images[:batch], threshold)
        pixels = images[:batch].numpy()
        logits, used = graph.run(None, dict(images=pixels, threshold=number)) if kind == "masked" else driver(pixels)
        assert used.dtype == np.int64 and used.tolist() == expected_used.tolist()
        torch.testing.assert_close(torch.from_numpy(logits), expected, **TOLERANCE)
        kinds |= set(used.tolist())
    assert kinds == {0.0: {3}, 0.5: {1, 2, 3}, 1.0: {1}}[threshold]


def test_threads_of_one_graph_do_not_spin_while_the_next_one_works(folders):
    """They did, and routed batches of 32 took four times as long as with them stopped."""
    from ride_timm.inference.onnx_driver import OnnxRouted

    driver = OnnxRouted(folders["driver"])
    for graph in (driver.trunk, *driver.experts, *driver.gates):
        assert graph.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


def test_the_driver_runs_experts_on_their_samples_only(folders, images):
    from ride_timm.inference.onnx_driver import OnnxRouted

    driver, rows = OnnxRouted(folders["driver"], 0.5), []

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def run(self, outputs, inputs):
            rows.append(len(inputs["maps"]))
            return self.inner.run(outputs, inputs)

    driver.experts = [Counting(expert) for expert in driver.experts]
    used = driver(images.numpy())[1]
    assert rows == [(used > i).sum() for i in range(3)] and rows[1] < 17
    assert OnnxRouted(folders["driver"]).threshold == 0.4  # the manifest's
    logits, used = driver(images[:0].numpy())
    assert logits.shape == (0, 7) and used.shape == (0,)


def test_the_exported_driver_serves_without_torch(folders, images):
    np.save(folders["driver"].parent / "images.npy", images.numpy())
    code = """
import sys
sys.modules["torch"] = None
import numpy
from driver import OnnxRouted
print(OnnxRouted(".")(numpy.load("../images.npy"))[0].shape)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folders["driver"], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.strip() == "(17, 7)", ran.stderr
    shutil.rmtree(folders["driver"] / "__pycache__", ignore_errors=True)


def test_the_manifest_says_what_is_expected(folders):
    files = {kind: sorted(path.name for path in folder.iterdir()) for kind, folder in folders.items()}
    assert files["none"] == files["masked"] == ["manifest.json", "model.onnx"]
    parts = ["driver.py", *(f"expert_{i}.onnx" for i in (1, 2, 3)), "gate_1.onnx", "gate_2.onnx"]
    assert files["driver"] == [*parts, "manifest.json", "trunk.onnx"]
    for kind, folder in folders.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["kind"] == {"none": "ensemble"}.get(kind, kind) and manifest["input_size"] == [3, 32, 32]
        assert manifest["threshold"] == (None if kind == "none" else 0.4)
        assert len(manifest["mean"]) == len(manifest["std"]) == 3
        assert manifest["labels"] == [str(i) for i in range(7)] and manifest["num_experts"] == 3
        for name, ends in manifest["graphs"].items():
            graph = session(folder / name)
            assert [i.name for i in graph.get_inputs()] == ends["inputs"]
            assert [o.name for o in graph.get_outputs()] == ends["outputs"]
        assert folder.stat().st_mode & 0o777 == 0o755


def test_a_driver_wants_its_own_kind(folders):
    from ride_timm.inference.onnx_driver import OnnxRouted

    with pytest.raises(ValueError, match="expected 'driver'"):
        OnnxRouted(folders["masked"])


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, model):
    def full_disk(module, path, *rest):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(export_module, "_export_graph", full_disk)
    with pytest.raises(RunError, match="no space left"):
        export(model, tmp_path / "new", "driver", size=32)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_exported_stays_as_it_was(tmp_path, monkeypatch, model):
    monkeypatch.setattr(export_module, "_export_graph", lambda *args: None)
    held = model.to(memory_format=torch.channels_last).train()
    (tmp_path / "empty").mkdir()
    export(held, tmp_path / "empty", size=32)  # an empty folder may be filled
    assert held.training and held.trunk.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    model.eval()


# the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.begin(load_recipe("fashion_lt").override(dict(threshold=0.3)), TrainingState())
    plain = timm.create_model("test_ride_resnet", num_classes=3)
    config = dict(input_size=(3, 32, 32), mean=(0.2,) * 3, std=(0.3,) * 3, crop_pct=1.0, interpolation="bilinear")
    folder.export(plain, config, ("a", "b", "c"))
    return str(folder.path)


def test_export_on_the_command_line(capsys, monkeypatch, tmp_path, run):
    monkeypatch.setattr(export_module, "_export_graph", lambda module, path, *rest: path.write_bytes(b"graph"))
    assert exit_code(main, ["export", "--model", run, "--output", str(tmp_path / "a" / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["files"]) == {"manifest.json", "model.onnx"}
    manifest = json.loads((tmp_path / "a" / "b" / "manifest.json").read_text())
    assert manifest["labels"] == ["a", "b", "c"] and manifest["input_size"] == [3, 32, 32]
    assert manifest["mean"] == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--routed", "driver"), "no router"),
        (("--routed", "sometimes"), "sometimes"),
        (("--threshold", "0.2"), "pass --routed as well"),
        (("--input-size", "0"), "input-size=0"),
    ],
)
def test_bad_exports(capsys, tmp_path, run, flags, message):
    assert exit_code(main, ["export", "--model", run, "--output", str(tmp_path / "new"), *flags]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_taken_folders(capsys, tmp_path, run):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for name, message in (("file", "is a file"), ("full", "is not empty")):
        assert exit_code(main, ["export", "--model", run, "--output", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_missing_packages(monkeypatch, tmp_path, model):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        export(model, tmp_path / "new")

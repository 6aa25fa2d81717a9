import json
from pathlib import Path

import pytest
import timm
import torch
from commands import CLASSES, output, refusal
from PIL import Image
from timm.data import create_transform, resolve_model_data_config


def test_predict(capsys, run, photos):
    lines = output(capsys, "predict", "--model", run, *photos).splitlines()
    assert len(lines) == 2 and all(line.startswith(photo) for line, photo in zip(lines, photos, strict=True))
    assert all(any(f": {name} " in line for name in CLASSES) and line.endswith(" %") for line in lines)


@pytest.mark.parametrize(("threshold", "used"), [("0", 3), ("1", 1)])
def test_predict_routed_in_json(capsys, run, photos, threshold, used):
    argv = ("predict", "--model", run, *photos, "--routed", "--threshold", threshold, "--json")
    rows = json.loads(output(capsys, *argv))
    assert [row["image"] for row in rows] == photos and [row["experts_used"] for row in rows] == [used, used]
    for row in rows:
        assert row["label"] == CLASSES[row["index"]] == row["top"][0]["label"] and len(row["top"]) == 5
        chances = [choice["probability"] for choice in row["top"]]
        assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1.00001
        assert row["probability"] == chances[0]


def test_predict_with_chosen_experts(capsys, run, photos):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    rows = json.loads(output(capsys, "predict", "--model", run, photos[0], "--experts", "3,1", "--json"))
    with torch.inference_mode():
        logits = model.forward_experts(transform(Image.open(photos[0]).convert("RGB"))[None])[1]
    chances = logits[:, [2, 0]].mean(1).softmax(1)[0]
    assert rows[0]["index"] == chances.argmax() and rows[0]["probability"] == pytest.approx(
        chances.max().item(), abs=1e-5
    )


def test_predictions_are_the_models(capsys, run, photos):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    rows = json.loads(output(capsys, "predict", "--model", run, *photos, "--json"))
    for row, photo in zip(rows, photos, strict=True):
        with torch.inference_mode():
            chances = model(transform(Image.open(photo).convert("RGB"))[None]).softmax(1)[0]
        assert row["index"] == chances.argmax().item() and "experts_used" not in row
        assert row["probability"] == pytest.approx(chances.max().item(), abs=1e-5)


def test_unreadable_images(capsys, tmp_path, run, photos):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "cut.png").write_bytes(Path(photos[0]).read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("not an image")
    for name in ("broken.png", "cut.png", "text.jpg", "missing.png", "."):
        message = refusal(capsys, "predict", "--model", run, photos[0], tmp_path / name)
        assert str(tmp_path / name) in message and "cannot be read" in message


def test_an_image_of_too_many_pixels_is_refused(capsys, run, photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert f"image {photos[1]} cannot be read" in refusal(capsys, "predict", "--model", run, photos[1])


def test_predictions_run_on_the_gpu_where_there_is_one(capsys, run, photos, monkeypatch):
    """Tested without a GPU: the device is recorded and replaced by the CPU."""
    from ride_timm.cli import predict

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(predict.torch, "device", lambda name: asked.append(name) or torch.zeros(0).device)
    output(capsys, "predict", "--model", run, photos[0])
    assert asked == ["cuda"]

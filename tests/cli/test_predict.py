"""Predictions: of the model itself, of files that cannot be read, as tables, with features."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from commands import CLASSES, output, refusal
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.evaluation.test_prior import estimate_log_prior


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


def rows_of(capsys, code, *argv):
    """Run predict with this exit code -> its rows, and its stderr."""
    assert exit_code(main, ["predict", *map(str, argv), "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_unreadable_images_are_rows_with_their_errors(capsys, tmp_path, run, photos):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "cut.png").write_bytes(Path(photos[0]).read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty").mkdir()
    bad = [str(tmp_path / name) for name in ("broken.png", "cut.png", "text.jpg", "missing.png", "*.webp", "empty")]
    alone = rows_of(capsys, 0, "--model", run, *photos)[0]
    rows, notice = rows_of(capsys, 0, "--model", run, photos[0], *bad, photos[1], "--batch-size", "3")
    assert [row["image"] for row in rows] == [photos[0], *bad, photos[1]]
    assert all(set(row) == {"image", "error"} for row in rows[1:-1])
    assert [row["index"] for row in (rows[0], rows[-1])] == [row["index"] for row in alone]
    assert rows[-1]["probability"] == pytest.approx(alone[1]["probability"], abs=1e-5)
    assert "UnidentifiedImageError" in rows[3]["error"] and "a folder without images" in rows[6]["error"]
    assert f"notice: 6 of 8 images cannot be read, the first: {bad[0]} (" in notice and notice.count("\n") == 1

    rows, error = rows_of(capsys, 1, "--model", run, *bad)
    assert all("error" in row for row in rows) and error.startswith("error: 6 of 6 images cannot be read")
    assert exit_code(main, ["predict", "--model", str(run), bad[0]]) == 1
    assert capsys.readouterr().out.startswith(f"{bad[0]}: cannot be read (")


def test_an_image_of_too_many_pixels_is_an_error(capsys, run, photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    rows, _ = rows_of(capsys, 0, "--model", run, *photos)
    assert "label" in rows[0] and rows[1]["error"].startswith("DecompressionBombError")


def test_predictions_run_on_the_gpu_where_there_is_one(capsys, run, photos, monkeypatch):
    """Tested without a GPU: the device is recorded and replaced by the CPU."""
    from ride_timm import hardware

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware.torch, "device", lambda name: asked.append(name) or torch.zeros(0).device)
    output(capsys, "predict", "--model", run, photos[0])
    assert asked == ["cuda"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_a_folder_in_batches_by_workers(capsys, run, photos, tmp_path, suffix):
    table = tmp_path / f"table{suffix}"
    flags = ("--batch-size", 1, "--workers", 1, "--top-k", 2, "--routed", "--threshold", 0)
    assert output(capsys, "predict", "--model", run, Path(photos[0]).parent, "--output", table, *flags) == ""
    expected, _ = rows_of(capsys, 0, "--model", run, *photos, "--routed", "--threshold", 0)
    rows = read_table(table)
    assert [row["image"] for row in rows] == photos and [int(row["experts_used"]) for row in rows] == [3, 3]
    for row, other in zip(rows, expected, strict=True):
        assert row["label"] == other["label"] and float(row["probability"]) == pytest.approx(
            other["probability"], abs=1e-5
        )
    assert [path.name for path in tmp_path.iterdir()] == [table.name]


def read_table(path):
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("flags", [(), ("--fuse",), ("--experts", "3,1")])
def test_features_are_the_inputs_of_the_classifiers(capsys, run, photos, flags):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(Image.open(photo).convert("RGB")) for photo in photos])
    with torch.inference_mode():
        features = model.forward_experts(images, [2, 0] if "--experts" in flags else None)[0].flatten(1)
    rows, _ = rows_of(capsys, 0, "--model", run, *photos, "--features", *flags)
    torch.testing.assert_close(torch.tensor([row["features"] for row in rows]), features, atol=1e-4, rtol=1e-3)


def test_names_on_standard_input(capsys, run, photos, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(photos).encode())))
    assert [row["image"] for row in rows_of(capsys, 0, "--model", run, "-")[0]] == photos


def test_names_that_are_no_text(capsys, run, photos, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.png")
    shutil.copy(photos[0], name)
    for suffix in (".csv", ".jsonl", ".parquet"):
        output(capsys, "predict", "--model", run, name, "--output", tmp_path / f"table{suffix}")
        assert read_table(tmp_path / f"table{suffix}")[0]["image"] == f"{tmp_path}/\ufffd.png"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output", "table.xls"), "expected a file that ends in .csv, .jsonl, .parquet"),
        (("--output", "nowhere/table.csv"), "no folder nowhere"),
        (("--output", "x" * 300 + ".csv"), "cannot be written (File name too long)"),
        (("--output", "table.csv", "--features"), "features are columns of .jsonl and .parquet files"),
        (("--output", "table.jsonl", "--json"), "exclude each other"),
        (("--features",), "features need --output FILE.jsonl or FILE.parquet, or --json"),
        (("--features", "--routed", "--json"), "leave out --routed"),
        (("--top-k", "0"), "top-k=0: expected 1 or more"),
        (("--batch-size", "0"), "batch-size=0: expected 1 or more"),
        (("--workers", "-1"), "workers=-1: expected 0 or more"),
        (("--device", "tpu9"), "device=tpu9: not usable here"),
    ],
)
def test_refused_flags(capsys, run, photos, flags, message):
    assert message in refusal(capsys, "predict", "--model", run, photos[0], *flags)


def test_a_test_prior_moves_the_logits(capsys, run, photos, tmp_path):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(Image.open(photo).convert("RGB")) for photo in photos])
    with torch.inference_mode():
        logits = model(images)
    (tmp_path / "prior.csv").write_text("".join(f"{name},{i}\n" for i, name in enumerate(CLASSES)))
    argv = ("predict", "--model", run, *photos, "--json", "--model-prior", "uniform", "--test-prior")
    for prior, shift in (
        (tmp_path / "prior.csv", (torch.arange(10) / 45).log() - torch.tensor(0.1).log()),
        ("uniform", torch.zeros(10)),
        ("estimate", estimate_log_prior(logits, torch.zeros(10)) - torch.tensor(0.1).log()),
    ):
        rows = json.loads(output(capsys, *argv, prior))
        for row, chances in zip(rows, (logits + shift).softmax(1), strict=True):
            assert row["index"] == chances.argmax().item()
            assert row["probability"] == pytest.approx(chances.max().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model-prior", "uniform"), "model-prior is where --test-prior moves the logits from"),
        (("--model-prior", "uniform", "--test-prior", "train"), "the model's folder has no class counts"),
        (("--model-prior", "uniform", "--test-prior", "absent.csv"), "absent.csv cannot be read"),
    ],
)
def test_priors_that_cannot_be_used(capsys, run, photos, flags, message):
    assert message in refusal(capsys, "predict", "--model", run, *photos, *flags)

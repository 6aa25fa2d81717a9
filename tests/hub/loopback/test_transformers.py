"""Releases in transformers, from a Hub and to it."""

import pytest
import timm
import torch
from double import WRITER
from PIL import Image

transformers = pytest.importorskip("transformers")


def load(repo, cache):
    return transformers.AutoModelForImageClassification.from_pretrained(repo, cache_dir=cache).eval()


@torch.no_grad()
def test_a_release_by_the_name_of_its_repository(published, release, tmp_path):
    model = load(published, tmp_path)
    process = transformers.AutoImageProcessor.from_pretrained(published, cache_dir=tmp_path)
    pixels = process(Image.new("RGB", (28, 28)))["pixel_values"]
    expected = timm.create_model(f"local-dir:{release.path}", pretrained=True).eval()(pixels)
    torch.testing.assert_close(model(pixels).logits, expected, rtol=0, atol=1e-6)
    assert model.config.id2label[0] == "T-shirt/top" and model.config.label2id["Ankle boot"] == 9
    classify = transformers.pipeline("image-classification", model=published, device="cpu", top_k=10)
    scores = {row["label"]: row["score"] for row in classify(Image.new("L", (28, 28)))}
    assert scores == pytest.approx(dict(zip(model.config.label2id, expected.softmax(-1)[0].tolist(), strict=True)))


@torch.no_grad()
def test_pushed_by_transformers_and_loaded_again(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    model = load(published, tmp_path / "theirs")
    for head in model.timm_model.get_classifier():
        head.weight.neg_()  # other weights than those whose sha256 the release states
    model.push_to_hub("org/tuned")
    x = torch.randn(2, 3, 28, 28)
    again = load("org/tuned", tmp_path / "ours")
    in_timm = timm.create_model("hf-hub:org/tuned", pretrained=True, cache_dir=tmp_path / "timm").eval()
    assert torch.equal(again(x).logits, model(x).logits) and torch.equal(in_timm(x), model(x).logits)
    assert again.config.id2label == model.config.id2label
    assert transformers.AutoImageProcessor.from_pretrained("org/tuned", cache_dir=tmp_path / "ours")

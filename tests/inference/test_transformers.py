"""Releases and run folders in transformers: models, pipelines, image processors and fine-tuning."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from commands import CLASSES, run_folder
from encoded_images import encoded, opened, smooth
from small_networks import build

from ride_timm.data.augment.images import build_transform
from ride_timm.data.augment.policies import POLICIES, Policy, backbone_policy
from ride_timm.models.release import class_names
from ride_timm.training.run_folder import RunFolder

transformers = pytest.importorskip("transformers")
from transformers.image_utils import load_image  # noqa: E402

RELEASES = sorted(path.parent for path in (Path(__file__).parents[2] / "hub").glob("ride_*/config.json"))
FASHION = RELEASES[0].with_name("ride_resnet32.fashion_lt")
AFFINE = RELEASES[0].with_name("ride_resnet32.cifar100_lt100_mutual")  # class_affine
ANY_SIZE = [(45, 37), (500, 333), (224, 224), (200, 3), (5, 60), (1, 1)]
# the backbones resize by bicubic interpolation, the second to a square
EVERY_POLICY = [
    *POLICIES.values(),
    *map(backbone_policy, ("vit_small_patch16_224", "convnext_base.fb_in22k_ft_in1k_384")),
]


def load(folder, **kwargs):
    return transformers.AutoModelForImageClassification.from_pretrained(folder, **kwargs).eval()


def by_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def fine_tuned(model, folder):
    """Train two steps on random images as transformers does by default; the loss of the first."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 28, 28, generator=generator) for _ in range(8)]
    data = [dict(pixel_values=image, labels=i % model.num_labels) for i, image in enumerate(images)]
    options = dict(max_steps=2, per_device_train_batch_size=8, logging_steps=1, save_steps=2, report_to=[])
    arguments = transformers.TrainingArguments(str(folder), **options, disable_tqdm=True, use_cpu=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return trainer.state.log_history[0]["loss"], data


def processor_of(policy: Policy, folder: Path):
    size = policy.input_size()
    RunFolder(folder).export(build(num_classes=2), policy.data_config(size), ("a", "b"))
    return transformers.AutoImageProcessor.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_a_release_has_timms_logits_and_its_names(folder):
    model, config = load(folder), json.loads((folder / "config.json").read_text())
    x = torch.randn(2, *config["pretrained_cfg"]["input_size"])
    torch.testing.assert_close(model(x).logits, by_timm(folder)(x), rtol=0, atol=1e-6)
    assert list(model.config.id2label.values()) == config["label_names"]
    assert model.config.label2id == {name: i for i, name in enumerate(config["label_names"])}


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: policy.name)
def test_the_processor_gives_the_pixels_of_the_test_transform(policy, tmp_path):
    process, transform = processor_of(policy, tmp_path), build_transform(policy, train=False)
    images = [smooth(*size) for size in ANY_SIZE]
    pixels = process(images)["pixel_values"]
    assert torch.equal(pixels, torch.stack([transform(image) for image in images]))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "rotated"])
def test_files_of_other_modes_are_read_alike(mode, tmp_path):
    """As `pipeline` reads them."""
    if mode == "rotated":
        data = encoded(smooth(40, 30), "JPEG", orientation=6)
    else:
        image = smooth(40, 30).convert(mode) if mode in ("P", "1") else smooth(40, 30, mode)
        data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    (tmp_path / "image").write_bytes(data)
    process, transform = processor_of(POLICIES["cifar"], tmp_path), build_transform("cifar", train=False)
    pixels = process(load_image(str(tmp_path / "image")))["pixel_values"][0]
    assert torch.equal(pixels, transform(opened(data)))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_pipeline_on_a_run_folder(mode, tmp_path):
    run_folder(tmp_path)
    image = smooth(40, 30, mode)
    found = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu", top_k=10)(image)
    x = build_transform("fashion", train=False)(image)[None]
    expected = dict(zip(CLASSES, by_timm(tmp_path)(x).softmax(-1)[0].tolist(), strict=True))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_features_of_a_release():
    model = transformers.AutoModel.from_pretrained(FASHION).eval()
    assert model.timm_model.router is None
    extract = transformers.pipeline("image-feature-extraction", model=str(FASHION), device="cpu", pool=True)
    image = smooth(28, 28, "L")
    x = transformers.AutoImageProcessor.from_pretrained(FASHION)(image.convert("RGB"))["pixel_values"]
    expected = timm.create_model(f"local-dir:{FASHION}", pretrained=True, num_classes=0).eval()(x)
    assert torch.equal(model(x).pooler_output, expected)
    torch.testing.assert_close(torch.tensor(extract(image)), expected)


def test_without_names_classes_are_numbered(tmp_path):
    RunFolder(tmp_path).export(build(num_classes=3), dict(input_size=(3, 64, 64)), ())
    assert load(tmp_path).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def saved_alike(folder, model, names):
    """Weights saved by transformers, loaded again there and in timm."""
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected, again, in_timm = model.eval()(x).logits, load(folder), by_timm(folder)
        assert torch.equal(again(x).logits, expected) and torch.equal(in_timm(x), expected)
    assert list(again.config.id2label.values()) == list(in_timm.pretrained_cfg["label_names"]) == names


def test_fine_tuning_by_trainer(tmp_path):
    model = load(FASHION)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, data = fine_tuned(model, tmp_path)
    images, labels = torch.stack([row["pixel_values"] for row in data]), torch.tensor([row["labels"] for row in data])
    start = by_timm(FASHION).train()
    torch.manual_seed(0)
    assert loss == pytest.approx(F.cross_entropy(start(images), labels).item(), rel=1e-5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    router = {name for name in before if ".router." in name}
    assert changed == set(before) - router  # every expert learns, the router as it was
    saved_alike(tmp_path / "checkpoint-2", model, list(model.config.id2label.values()))


@pytest.mark.parametrize("folder", [FASHION, AFFINE], ids=lambda path: path.name)
def test_fine_tuning_to_other_classes(folder, tmp_path):
    names = ["ant", "bee", "cicada", "drone"]
    labels = dict(num_labels=4, label_names=names, id2label=dict(enumerate(names)))
    model = load(folder, **labels, ignore_mismatched_sizes=True)
    assert model.config.id2label == labels["id2label"]
    loss, _ = fine_tuned(model, tmp_path)
    assert loss < 10  # new heads are initialised
    saved_alike(tmp_path / "checkpoint-2", model, names)


@torch.no_grad()
def test_other_classes_named_to_transformers_alone_are_numbered(tmp_path):
    names = {0: "ant", 1: "bee", 2: "cicada"}
    labels = dict(id2label=names, label2id={name: i for i, name in names.items()})
    model = load(FASHION, num_labels=3, **labels, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)  # with the label_names of the release
    x = torch.randn(2, 3, 28, 28)
    with pytest.warns(UserWarning, match="states 10 label_names for num_classes=3.*pass label_names"):
        again = by_timm(tmp_path)
    assert torch.equal(again(x), model(x).logits) and class_names(again) == ["0", "1", "2"]

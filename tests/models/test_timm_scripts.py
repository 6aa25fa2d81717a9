"""The calls of timm's scripts, which its wheels do not ship.

train.py, validate.py, inference.py and benchmark.py.
"""

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.layers import apply_test_time_pool
from timm.models import load_checkpoint, resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, reparameterize_model, unwrap_model

import ride_timm  # noqa: F401  (registers the models)
from ride_timm.models.release import release_table

MODELS = {
    "test_ride_resnet": dict(num_experts=2),
    "ride": dict(backbone="test_vit", num_experts=2, img_size=64),
}


def loader_of(root, config, training=False):
    folder = create_dataset("", root=root, split="train" if training else "test")
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    settings = {key: config[key] for key in keys}
    device = torch.device("cpu")
    return create_loader(folder, batch_size=10, is_training=training, num_workers=0, device=device, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_train_then_validate_then_predict(name, colours, tmp_path):
    asked = dict(img_size=64)
    model = timm.create_model(**resolve_model_input_args(name, asked, num_classes=3, drop_rate=0.1, **MODELS[name]))
    model.set_grad_checkpointing(enable=True)
    config = resolve_input_data_config(model, asked)
    theirs = timm.get_pretrained_cfg(MODELS[name].get("backbone", name))
    assert config["input_size"] == (3, 64, 64)
    assert (config["mean"], config["crop_pct"]) == (theirs.mean, theirs.crop_pct)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    grouped = sum(len(group["params"]) for group in optimizer.param_groups)
    assert grouped == len(list(model.parameters())) and len({g["lr_scale"] for g in optimizer.param_groups}) > 3
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    loader = loader_of(colours, config, training=True)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=1, updates_per_epoch=len(loader))
    model.train()
    task = ClassificationTask(model, verbose=False)
    for images, targets in loader:
        loss = task(images, targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    scheduler.step(1)
    saver.save_checkpoint(0, metric=1.0)
    assert safe_model_name(name) == name and unwrap_model(model) is model

    again = timm.create_model(name, num_classes=3, **MODELS[name]).eval()
    load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=True)
    again = reparameterize_model(again)
    again, pooled = apply_test_time_pool(again, config)
    assert not pooled
    with torch.inference_mode():
        for images, targets in loader_of(colours, config):
            torch.testing.assert_close(again(images), ema.module.eval()(images))
            top1, top2 = accuracy(again(images), targets, topk=(1, 2))
            probabilities, labels = again(images).softmax(-1).topk(2)
            assert 0 <= top1 <= top2 <= 100 and labels.shape == probabilities.shape == (10, 2)


@pytest.mark.parametrize("name", MODELS)
def test_benchmark(name):
    model = timm.create_model(name, num_classes=3, exportable=True, **MODELS[name]).eval()
    assert model.pretrained_cfg["classifier"] == tuple(model.get_classifier(name_only=True))
    scripted = torch.jit.script(timm.create_model(name, num_classes=3, scriptable=True, **MODELS[name]).eval())
    x = torch.randn(2, 3, 64, 64)
    assert scripted(x).shape == model(x).shape == (2, 3)
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype=dtype, memory_format=torch.channels_last)(x.to(dtype)).dtype == dtype


def test_our_networks_are_listed():
    names = timm.list_models("ride_*")
    assert {"ride_resnet32", "ride_swin_tiny", "ride_vit_small_patch16_224"} <= set(names) and timm.is_model("ride")
    published = {tag for tag, release in release_table().items() if release.get("published")}
    assert set(timm.list_pretrained("ride_*")) == published
    assert timm.get_pretrained_cfg("ride_swin_tiny").tag == "imagenet_lt"

"""The table of releases, and releases in folders; tests/hub covers those on a Hub."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import generate_default_cfgs, resolve_model_input_args

from ride_timm import InputError
from ride_timm.models import download, release
from ride_timm.models.download import repository_of
from ride_timm.models.load import load_model, load_teacher
from ride_timm.models.release import read_config, release_table, sha256_of
from ride_timm.training.build import create_model
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder


def test_every_release_is_a_tag_that_can_be_built():
    for tag, row in release_table().items():
        assert set(row) <= {"model_args", "sha256", "published"}
        with torch.device("meta"):
            model = timm.create_model(tag)
        assert model.num_classes == timm.get_pretrained_cfg(tag).num_classes
        assert model.num_experts == row["model_args"].get("num_experts", 3)
        assert (model.router is not None) == row["model_args"].get("router", False)


def test_own_arguments_override_a_tag():
    assert timm.create_model("ride_resnet32").router is None
    model = timm.create_model("ride_resnet32.cifar100_lt100_6experts", num_experts=2, num_classes=5)
    assert (model.num_experts, model.num_classes) == (2, 5)
    assert create_model(load_recipe("fashion_lt").override(dict(model="ride_resnet32.fashion_lt")), 10).router is None


def test_timms_scripts_pass_the_cfg_of_a_tag():
    asked = resolve_model_input_args("ride_resnet32.cifar100_lt100_6experts", {})
    assert isinstance(asked["pretrained_cfg"], dict) and timm.create_model(**asked).num_experts == 6
    bare = timm.create_model(**resolve_model_input_args("ride_resnet32", {}))
    assert (bare.num_experts, bare.router) == (3, None)
    other = dict(asked["pretrained_cfg"], num_classes=5)  # a cfg of the caller
    assert timm.create_model("ride_resnet32", pretrained_cfg=other).num_experts == 3


@pytest.mark.parametrize("published", ["fashion_lt", "cifar100_lt100", None])
def test_a_bare_name_keeps_its_tag_whatever_is_published(monkeypatch, published):
    monkeypatch.setattr(release, "release_table", lambda: {f"ride_resnet32.{published}": dict(published=True)})
    tags = ("cifar100_lt100", "fashion_lt")
    found = generate_default_cfgs(release.with_releases({f"ride_resnet32.{tag}": {} for tag in tags}))
    assert found["ride_resnet32"].tags[0] == "cifar100_lt100" and len(found["ride_resnet32"].tags) == 2
    assert [tag for tag in tags if found["ride_resnet32"].cfgs[tag].has_weights] == [published] * bool(published)


@pytest.mark.parametrize(
    ("value", "owner"), [(None, "ride-timm"), ("", "ride-timm"), ("somebody", "somebody"), ("a.b-c_d", "a.b-c_d")]
)
def test_the_owner_of_a_repository(monkeypatch, value, owner):
    monkeypatch.delenv("RIDE_TIMM_HUB", raising=False)
    if value is not None:
        monkeypatch.setenv("RIDE_TIMM_HUB", value)
    assert repository_of("ride_resnet32.fashion_lt") == f"{owner}/ride_resnet32.fashion_lt"


@pytest.mark.parametrize("value", ["a/b", "..", "https://x", "a b", "a..b"])
def test_invalid_owners(monkeypatch, value):
    monkeypatch.setenv("RIDE_TIMM_HUB", value)
    with pytest.raises(InputError, match="expected a user or an organisation"):
        repository_of("ride_resnet32.fashion_lt")


@pytest.mark.parametrize("name", ["ride_resnet101", "ride_resnet101.untrained", "test_ride_resnet", "ride"])
def test_untrained_tags_are_not_looked_up(monkeypatch, name):
    monkeypatch.setattr(download, "download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    variant = name.partition(".")[0]
    with pytest.raises(InputError, match=f"^{variant} has no weights of its own: drop pretrained=True") as refused:
        timm.create_model(name, pretrained=True)
    assert ("backbone_pretrained=True" in str(refused.value)) == (name == "ride")


@pytest.mark.parametrize(
    ("tag", "published", "clone"),
    [
        ("ride_resnet32.fashion_lt", False, "local-dir:hub/ride_resnet32.fashion_lt"),
        ("ride_resnet50.inat18", False, "local-dir:hub/NAME.TAG"),  # known, not staged
        ("ride_swin_tiny.imagenet_lt", False, "local-dir:hub/NAME.TAG"),
        ("ride_resnet32.fashion_lt", True, None),
    ],
)
def test_offline_the_error_names_the_staged_folder(monkeypatch, tmp_path, tag, published, clone):
    table = release_table()
    row = table.get(tag, {}) | dict(published=published)
    monkeypatch.setattr(download, "release_table", lambda: table | {tag: row})
    with pytest.raises(InputError, match=rf"{tag} .*is not in the cache.* load a folder by local-dir:") as refused:
        timm.create_model(tag, pretrained=True, cache_dir=tmp_path)
    message = str(refused.value)
    assert message.endswith(f"in a clone of the project the staged releases are {clone}." if clone else "local-dir:.")


@pytest.fixture
def folder(tmp_path):
    """A release in a folder, whose config.json states the sha256."""
    model = timm.create_model("test_ride_resnet", num_classes=4).eval()
    RunFolder(tmp_path).export(model, dict(input_size=(3, 64, 64)), ())
    config = json.loads((tmp_path / "config.json").read_text())
    config["sha256"] = sha256_of(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def create(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def test_a_folder(folder):
    assert create(folder).num_classes == 4
    assert read_config(folder / "config.json", "here", "test_ride_resnet")[2]
    with pytest.raises(InputError, match="expected a ride_resnet50"):
        read_config(folder / "config.json", "here", "ride_resnet50")


def test_changed_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError, match=r"does not have the sha256 stated in config\.json"):
        create(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(folder, bad, dtype):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("running_var"))
    weights[name][:2] = bad
    save_file({key: value.to(dtype) for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(sha256="")))
    size = len(weights[name])
    message = rf"model\.safetensors: 2 of the {size} values of {name} are NaN or infinite"
    for load in (create, load_model):
        with pytest.raises(InputError, match=message):
            load(folder)


def test_large_images_are_no_matter_of_the_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 1280, 1280]
    (folder / "config.json").write_text(json.dumps(config))
    assert create(folder).pretrained_cfg["input_size"] == (3, 1280, 1280)


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        (dict(model_args=dict(num_experts=4)), "num_experts=4"),
        (dict(model_args=dict(num_experts=10**9)), "num_experts=1000000000"),
        (dict(model_args=dict(layer3_output_dim=10**6)), "layer3_output_dim=1000000"),
        (dict(model_args=dict(layer3_output_dim=-(10**6))), "layer3_output_dim=-1000000"),
        (dict(num_classes=10**9), "num_classes=1000000000"),
        (dict(pretrained_cfg=dict(input_size=[10**9, 64, 64])), "input_size"),
    ],
)
def test_networks_far_larger_than_the_weights_are_not_built(folder, changes, stated):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"states {stated}.*too large for its weights"):
        create(folder)


def test_names_of_other_classes_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(label_names=["a", "b", "c"])))
    with pytest.raises(InputError, match=r"states 3 label_names for num_classes=4"):
        create(folder)


def test_teachers_that_are_not_finite_are_refused(tmp_path):
    teacher = timm.create_model("test_vit", num_classes=4)
    torch.nn.init.constant_(teacher.norm.weight, float("nan"))
    timm.models.save_for_hf(teacher, tmp_path, safe_serialization=True)
    with pytest.raises(InputError, match=r"64 of the 64 values of norm\.weight are NaN"):
        load_teacher(f"local-dir:{tmp_path}", 4, (3, 160, 160))


def test_pickles_in_a_folder_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds no model\.safetensors: only safetensors are read"):
        create(folder)


def test_configs_are_checked_without_weights_too(folder):
    config = json.loads((folder / "config.json").read_text())
    for key, value in dict(
        checkpoint_path="/etc/passwd", backbone_pretrained="x.pth", block="os.system", pruned=True, kwargs_filter="x"
    ).items():
        (folder / "config.json").write_text(json.dumps(config | dict(model_args={key: value})))
        with pytest.raises(InputError, match=r"model_args that the network does not take|names other weights"):
            timm.create_model(f"local-dir:{folder}", pretrained=False)


def test_factory_arguments_are_refused_for_any_backbone(tmp_path):
    RunFolder(tmp_path).export(timm.create_model("ride", backbone="test_resnet"), dict(input_size=(3, 64, 64)), ())
    config = json.loads((tmp_path / "config.json").read_text())
    hostile = dict(
        make_parts="os:system", variant="x", pretrained_filter_fn="os.system", features_only=True, checkpoint_path="/"
    )
    for key, value in hostile.items():
        args = config["model_args"] | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(config | dict(model_args=args)))
        with pytest.raises(InputError, match=f"does not take: {key}="):
            create(tmp_path)

"""`pretrained=True` and its kin against a Hub, by the real clients: what works, and each way it can fail."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from double import STRANGER, WRITER
from huggingface_hub import constants
from timm.models import _registry, generate_default_cfgs, resolve_model_input_args

from ride_timm import InputError
from ride_timm.inference.load import data_recipe, own_recipe, threshold_for
from ride_timm.inference.model_prior import run_log_prior, run_results
from ride_timm.models import download
from ride_timm.models import release as release_module  # `release` is a fixture here
from ride_timm.models.load import load_model
from ride_timm.models.release import CONFIG, WEIGHTS, sha256_of

NAME = "ride_resnet32.fashion_lt"


def create(cache, spec=NAME, **kwargs):
    return timm.create_model(spec, pretrained=True, cache_dir=cache, **kwargs).eval()


def golden(release):
    return safetensors.torch.load_file(release.path / "golden.safetensors")


def cached_weights(cache):
    (blob,) = {path.resolve() for path in Path(cache).rglob(WEIGHTS)}
    return blob


def test_a_tag_from_an_empty_cache(published, release, tmp_path):
    model, pair = create(tmp_path), golden(release)
    torch.testing.assert_close(model(pair["input"]), pair["output"])
    logits, used = model.forward_routed(pair["input"])
    torch.testing.assert_close(logits, pair["routed_output"])
    assert torch.equal(used, pair["experts_used"])
    assert model.num_experts == 2  # what the release was made with, not the network's default
    assert model.pretrained_cfg["label_names"][0] == "T-shirt/top"
    assert model.pretrained_cfg["hf_hub_id"] == published


@pytest.mark.parametrize("spec", [f"hf-hub:org/{NAME}", f"hf-hub:org/{NAME}@v0.1.0"])
def test_by_the_name_of_a_repository(published, release, tmp_path, spec):
    pair = golden(release)
    torch.testing.assert_close(create(tmp_path, spec)(pair["input"]), pair["output"])


def test_as_timms_scripts_ask_for_it_once_it_is_published(published, release, tmp_path, monkeypatch):
    places = {NAME: dict(published=True)}
    monkeypatch.setattr(release_module, "release_table", lambda: places)
    cfgs = generate_default_cfgs(release_module.with_releases({NAME: timm.get_pretrained_cfg(NAME).to_dict()}))
    monkeypatch.setitem(_registry._model_pretrained_cfgs, NAME, cfgs["ride_resnet32"].cfgs["fashion_lt"])
    asked = resolve_model_input_args(NAME, {})
    assert asked["pretrained_cfg"]["hf_hub_id"] == f"ride-timm/{NAME}"  # RIDE_TIMM_HUB stands over it
    model, pair = timm.create_model(pretrained=True, cache_dir=tmp_path, **asked).eval(), golden(release)
    torch.testing.assert_close(model.forward_routed(pair["input"])[0], pair["routed_output"])
    assert model.num_experts == 2 and model.pretrained_cfg["hf_hub_id"] == published


def test_other_classes_channels_and_no_router(published, release, tmp_path):
    reference, images = create(tmp_path), golden(release)["input"]
    fewer = create(tmp_path, num_classes=7)
    assert fewer(images).shape == (4, 7) and fewer.router is not None
    torch.testing.assert_close(fewer.forward_experts(images)[0], reference.forward_experts(images)[0])
    grey = create(tmp_path, in_chans=1)
    torch.testing.assert_close(grey.trunk.conv1.weight, reference.trunk.conv1.weight.sum(1, keepdim=True))
    assert create(tmp_path, num_classes=0)(images).shape == (4, reference.num_features)
    plain = create(tmp_path, router=False)
    assert plain.router is None and torch.equal(plain(images), reference(images))
    levels = create(tmp_path, features_only=True)(images)
    assert len(levels) == 4


def test_fine_tuning_from_a_release(published, release, tmp_path):
    model, images = create(tmp_path, num_classes=2, router=False).train(), golden(release)["input"]
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_with_a_warm_cache_nothing_is_needed(published, release, hub, tmp_path, monkeypatch):
    create(tmp_path)
    pair = golden(release)
    hub.stop()
    try:
        torch.testing.assert_close(create(tmp_path)(pair["input"]), pair["output"])
    finally:
        hub.start()
    count = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(create(tmp_path)(pair["input"]), pair["output"])
    with pytest.raises(InputError, match=rf"org/{NAME}.* not in the cache.*HF_HUB_OFFLINE"):
        create(tmp_path / "cold")
    assert len(hub.requests) == count


def test_a_fresh_offline_process_predicts(published, release, tmp_path):
    create(tmp_path)
    code = f"""
import timm, torch, ride_timm
model = timm.create_model({NAME!r}, pretrained=True, cache_dir={str(tmp_path)!r}).eval()
print(model(torch.zeros(1, 3, 28, 28)).shape)
"""
    started = time.perf_counter()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert ran.stdout.strip() == "torch.Size([1, 10])", ran.stderr
    print(f"first prediction of a fresh process, warm cache: {time.perf_counter() - started:.1f} s")


# downloads that go wrong


@pytest.mark.parametrize("do", ["corrupt", "cut", "short"])
def test_a_bad_download_is_repaired(published, release, hub, tmp_path, do):
    hub.faults.append(dict(match="/_cdn/", method="GET", do=do, times=1))
    pair = golden(release)
    torch.testing.assert_close(create(tmp_path)(pair["input"]), pair["output"])
    assert sha256_of(cached_weights(tmp_path)) == release.json(CONFIG)["sha256"]


@pytest.mark.parametrize(
    ("do", "message"),
    [("corrupt", "does not have the stated sha256 .* not loaded"), ("short", "could not be downloaded")],
)
def test_a_download_that_stays_bad_is_refused(published, hub, tmp_path, do, message):
    hub.faults.append(dict(match="/_cdn/", method="GET", do=do, times=99))
    with pytest.raises(InputError, match=message):
        create(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_cache_is_repaired_online_and_refused_offline(published, release, tmp_path, monkeypatch, damage):
    create(tmp_path)
    blob = cached_weights(tmp_path)
    blob.write_bytes(damage(blob.read_bytes()))
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match=r"does not have the stated sha256"):
            create(tmp_path)
    pair = golden(release)
    torch.testing.assert_close(create(tmp_path)(pair["input"]), pair["output"])


def test_a_damaged_config_in_the_cache_is_repaired(published, tmp_path):
    create(tmp_path)
    (config,) = {path.resolve() for path in tmp_path.rglob(CONFIG)}
    config.write_text(config.read_text()[:-50])
    create(tmp_path)


# repositories that are not what they should be


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def changed(files, **changes):
    """The release's files with these entries of config.json."""
    return files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | changes).encode()}


def test_unpublished(tmp_path):
    with pytest.raises(InputError, match=r"not published: org/ride_resnext50\.imagenet_lt on http.*zoo\.py"):
        create(tmp_path, "ride_resnext50")
    with pytest.raises(InputError, match=r"ride_resnet101 has no weights of its own"):
        create(tmp_path, "ride_resnet101")


def test_the_namespace_without_a_word_is_the_projects(tmp_path, monkeypatch):
    monkeypatch.delenv("RIDE_TIMM_HUB")
    with pytest.raises(InputError, match=r"not published: ride-timm/ride_swin_tiny\.imagenet_lt"):
        create(tmp_path, "ride_swin_tiny")
    monkeypatch.setenv("RIDE_TIMM_HUB", "../evil")
    with pytest.raises(InputError, match=r"RIDE_TIMM_HUB='\.\./evil'"):
        create(tmp_path, "ride_swin_tiny")


def test_private_and_gated(hub, files, tmp_path, monkeypatch):
    hub.put(f"locked/{NAME}", files, private=True)
    hub.put(f"gate/{NAME}", files, gated=True)
    monkeypatch.setenv("RIDE_TIMM_HUB", "locked")
    with pytest.raises(InputError, match=r"does not exist or is private"):
        create(tmp_path)
    monkeypatch.setenv("RIDE_TIMM_HUB", "gate")
    with pytest.raises(InputError, match=r"gated: request access"):
        create(tmp_path)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(InputError, match=r"gated: request access") as caught:
        create(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_nobodyknowsthisone")
    with pytest.raises(InputError) as wrong:
        create(tmp_path)
    assert "hf_" not in str(caught.value) + str(wrong.value)


def test_pickles_are_never_read(hub, files, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    bad = {name: pickle.dumps(Evil(marker)) for name in ("pytorch_model.bin", "model.pth", "golden.pkl")}
    hub.put(f"pickles/{NAME}", {CONFIG: files[CONFIG]} | bad)
    monkeypatch.setenv("RIDE_TIMM_HUB", "pickles")
    for spec in (NAME, f"hf-hub:pickles/{NAME}"):
        with pytest.raises(InputError, match=r"has no model\.safetensors, and pickled weights are never read"):
            create(tmp_path / "cache", spec)
    hub.put("pickles/foreign", {CONFIG: json.dumps(dict(architecture="resnet18", num_classes=3)).encode()} | bad)
    with pytest.raises(InputError, match=r"holds a resnet18, expected a network with experts"):
        load_model("hf-hub:pickles/foreign")
    hub.put(f"pickles/{NAME}", {WEIGHTS: bad["model.pth"]})  # a pickle by the right name
    with pytest.raises(InputError, match=r"sha256"):
        create(tmp_path / "cache")
    assert not marker.exists()


def test_a_pickle_with_the_right_sha256_is_damaged_safetensors(hub, files, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    data = pickle.dumps(Evil(marker))
    hub.put(f"disguise/{NAME}", changed(files, sha256=hashlib.sha256(data).hexdigest()) | {WEIGHTS: data})
    monkeypatch.setenv("RIDE_TIMM_HUB", "disguise")
    with pytest.raises(InputError, match=r"model\.safetensors is damaged: not loaded"):
        create(tmp_path / "cache")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architecture="ride_resnet50"), "holds a ride_resnet50, expected a ride_resnet32"),
        (dict(sha256=""), "states no sha256 of the weights"),
        (dict(sha256="0" * 64), "does not have the stated sha256"),
        (dict(sha256="../../x"), "expected 64 hexadecimal digits"),
        (dict(model_args=dict(num_experts=3)), r"states num_experts=3, too large for its weights"),
        (dict(model_args=dict(num_experts=1)),
         r"do not fit .*made with num_experts=1.*(unexpected experts\.1|experts\.0\.fc\.weight has)"),  # by torch
        (dict(model_args=dict(checkpoint_path="/etc/passwd")), "does not take: checkpoint_path="),
        (dict(model_args=dict(block="os.system")), "does not take: block="),
        (dict(model_args=dict(build="os:system")), "does not take: build="),
        (dict(model_args=dict(num_experts=dict(a=1))), "does not take: num_experts="),
        (dict(model_args=7), r"config\.json is not that of a timm model"),
        (dict(pretrained_cfg=dict(file="/etc/passwd", input_size=[3, 28, 28])), r"names other weights \(file="),
        (dict(pretrained_cfg=dict(url="http://evil/x.pth", input_size=[3, 28, 28])), r"names other weights \(url="),
        (dict(pretrained_cfg=dict(hf_hub_filename="../../x.bin", input_size=[3, 28, 28])), r"other weights \(hf_hub_f"),
        (dict(pretrained_cfg=dict(custom_load="hf", input_size=[3, 28, 28])), r"other weights \(custom_load="),
        (dict(pretrained_cfg=dict(nonsense=1)), r"config\.json is not that of a timm model"),
        (dict(pretrained_cfg=dict(input_size="big")), "states input_size="),
        (dict(pretrained_cfg=[]), r"config\.json is not that of a timm model"),
    ],
)  # fmt: skip
def test_hostile_and_wrong_configurations(hub, files, tmp_path, monkeypatch, request, changes, message):
    owner = f"case{abs(hash(request.node.name))}"
    hub.put(f"{owner}/{NAME}", changed(files, **changes))
    monkeypatch.setenv("RIDE_TIMM_HUB", owner)
    with pytest.raises(InputError, match=message):
        create(tmp_path)


def test_no_configuration(hub, files, tmp_path, monkeypatch):
    hub.put(f"bare/{NAME}", {WEIGHTS: files[WEIGHTS]})
    monkeypatch.setenv("RIDE_TIMM_HUB", "bare")
    with pytest.raises(InputError, match=r"has no config\.json: not a timm model"):
        create(tmp_path)
    hub.put(f"broken/{NAME}", files | {CONFIG: b"{"})
    monkeypatch.setenv("RIDE_TIMM_HUB", "broken")
    with pytest.raises(InputError, match=r"config\.json is not that of a timm model"):
        create(tmp_path)


def test_the_projects_own_release_has_the_sha256_beside_its_tag(hub, files, release, tmp_path, monkeypatch):
    hub.put(f"ride-timm/{NAME}", files)
    monkeypatch.delenv("RIDE_TIMM_HUB")
    beside = {NAME: dict(sha256="0" * 64)}
    monkeypatch.setattr(download, "release_table", lambda: beside)
    with pytest.raises(InputError, match=r"does not state the released sha256"):
        create(tmp_path)
    beside[NAME]["sha256"] = release.json(CONFIG)["sha256"]
    create(tmp_path)


@pytest.mark.parametrize("spec", ["hf-hub:org/nothing", "hf-hub:not a name", "hf-hub:org/x@v9"])
def test_the_command_line_says_what_is_wrong(hub, files, spec):
    hub.put("org/x", {CONFIG: files[CONFIG]})
    with pytest.raises(InputError, match=r"org/nothing .*not exist|not the name of a Hub|no such revision"):
        load_model(spec)


def test_commands_read_threshold_prior_and_recipe_of_a_repository(published, release):
    spec = f"hf-hub:{published}"
    assert run_results(spec) == release.json("results.json")
    torch.testing.assert_close(run_log_prior(spec), run_log_prior(str(release.path)))
    assert own_recipe(spec) == data_recipe(None, spec, {}) == own_recipe(str(release.path))
    assert threshold_for(spec, None) == own_recipe(spec).threshold


def test_a_token_reads_what_is_private(hub, files, release, tmp_path, monkeypatch):
    hub.put("org/private", files, private=True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    pair = golden(release)
    torch.testing.assert_close(create(tmp_path, "hf-hub:org/private")(pair["input"]), pair["output"])

"""Pushing a release and a split to a Hub with the real clients, and what must be refused before anything is sent."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from card import BEGIN, END, NOTHING_YET, write_card
from double import READER, STRANGER, WRITER
from huggingface_hub import HfApi, ModelCard, get_token
from publish import RELEASE, main, publish
from splits import check_split, publish_split, read_split
from verify import verify

from ride_timm import InputError, RunError
from ride_timm.cli.process import exit_code
from ride_timm.data.load import load_longtail
from ride_timm.models.release import sha256_of
from ride_timm.training.recipe import Recipe

NAME = "ride_resnet32.fashion_lt"


def writes(hub, since):
    return [line for line in hub.requests[since:] if line.split()[0] in ("POST", "PUT", "DELETE")]


def test_a_dry_run_sends_nothing(release, hub, capsys):
    count = len(hub.requests)
    changes = publish(release, f"org/dry.{NAME}", push=False)
    assert set(changes.values()) == {"add"} and {"README.md", "model.safetensors"} <= set(changes)
    assert not writes(hub, count) and len(hub.requests) > count
    out = capsys.readouterr().out
    assert "dry run, nothing is sent" in out and "(new)" in out and f"release {RELEASE}: new" in out


def test_what_was_pushed_from_nothing(published, release, hub):
    repo = hub.repos["model", published]
    files = repo.files(RELEASE)
    assert set(files) == set(release.hashes()) and "verified.json" not in files
    assert all(hub.content(files[path.name]) == path.read_bytes() for path in release.path.iterdir()
               if path.name in files)  # fmt: skip
    info = HfApi(token=False).model_info(published)
    assert info.card_data.library_name == "timm" and info.card_data.license == "mit"
    (index,) = info.card_data.to_dict()["model-index"]
    names = [metric["name"] for metric in index["results"][0]["metrics"]]
    assert {f"accuracy, {g}, {kind}" for g in ("all", "many", "medium", "few") for kind in ("ensemble", "routed")} <= {
        *names
    }


def test_pushing_again_changes_nothing(published, release, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    before = hub.repos["model", published].main
    assert set(publish(release, published, push=True).values()) == {"same"}
    assert hub.repos["model", published].main == before
    assert "nothing to change" in capsys.readouterr().out


def test_a_changed_card_keeps_what_was_written_by_hand(copy_of, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    repo = f"alice/{NAME}"
    publish(copy_of, repo, push=True)
    tagged = hub.repos["model", repo].tags[RELEASE]
    card = ModelCard.load(repo, token=WRITER)
    assert f"{BEGIN}\n{NOTHING_YET}\n{END}" in card.content
    card.content = card.content.replace(NOTHING_YET, "Used by the museum.\n\nThanks!")
    card.push_to_hub(repo, token=WRITER)
    results = copy_of.json("results.json")
    results["seconds"] = 7200.0
    (copy_of.path / "results.json").write_text(json.dumps(results))
    write_card(copy_of, NOTHING_YET)
    verify(copy_of)
    changes = publish(copy_of, repo, push=True)
    assert {name for name, change in changes.items() if change == "change"} == {"README.md", "results.json"}
    text = ModelCard.load(repo, token=WRITER).content
    assert "Used by the museum.\n\nThanks!" in text and "120 minutes" in text
    assert hub.repos["model", repo].tags[RELEASE] == tagged  # a release stays where it is


def test_a_release_does_not_change_its_weights(published, copy_of, hub, monkeypatch):
    weights, config = copy_of.path / "model.safetensors", copy_of.json("config.json")
    tensors = safetensors.torch.load_file(weights)
    tensors["trunk.conv1.weight"] += 1e-6
    safetensors.torch.save_file(tensors, weights)
    (copy_of.path / "config.json").write_text(json.dumps(config | dict(sha256=sha256_of(weights)), indent=2))
    write_card(copy_of, NOTHING_YET)
    verify(copy_of)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    count = len(hub.requests)
    with pytest.raises(InputError, match=rf"release {RELEASE} .* exists with other weights"):
        publish(copy_of, published, push=True)
    assert not writes(hub, count)


@pytest.mark.parametrize(
    ("token", "owner", "message"),
    [
        (None, "org", "pushing needs a token"),
        ("hf_nobodyknowsthisone", "org", "does not know your token"),
        (READER, "org", "can only read"),
        (STRANGER, "org", "may not write to org"),
    ],
)
def test_tokens_that_will_not_do(release, hub, monkeypatch, capsys, token, owner, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        assert get_token() is None
    count, repos = len(hub.requests), set(hub.repos)
    code = exit_code(
        main, [NAME, "--root", str(release.path.parent), "--namespace", f"{owner}", "--push", "--release", "v9"]
    )
    err = capsys.readouterr().err
    assert code == 2 and message in err and "hf_l" not in err and "hf_n" not in err
    assert set(hub.repos) == repos and not [line for line in writes(hub, count) if "/commit/" in line]


def test_unverified_folders_are_refused(copy_of, hub):
    count = len(hub.requests)
    (copy_of.path / "README.md").write_text("something else")
    with pytest.raises(InputError, match=r"changed after it was verified \(README\.md\)"):
        publish(copy_of, "org/x", push=True)
    with pytest.raises(InputError, match=r"README\.md says something else than its data"):
        verify(copy_of)
    with pytest.raises(InputError, match=r"is not verified: python hub/verify\.py"):
        publish(copy_of, "org/x", push=True)
    assert len(hub.requests) == count


def test_an_upload_that_breaks_off_leaves_no_release(release, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub.faults.append(dict(match="/commit/main", method="POST", status=500, times=9))
    with pytest.raises(RunError, match=r"failed \(500\): try again"):
        publish(release, "org/broken", push=True)
    assert not hub.repos["model", "org/broken"].tags
    hub.faults.clear()
    publish(release, "org/broken", push=True)
    assert RELEASE in hub.repos["model", "org/broken"].tags


def test_a_damaged_upload_is_noticed_afterwards(release, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub.faults.append(dict(match="/_cdn/", method="GET", do="corrupt", times=99))
    with pytest.raises((InputError, RunError), match=r"sha256|not the staged file"):
        publish(release, "org/damaged", push=True)
    assert not hub.repos["model", "org/damaged"].tags


def test_no_token_in_what_is_sent_or_kept(published, release, hub):
    tokens = (WRITER, READER, STRANGER)
    assert not [line for line in hub.requests if any(token in line for token in tokens)]
    for file in hub.repos["model", published].files().values():
        assert not any(token.encode() in hub.content(file) for token in tokens)
    for path in release.path.iterdir():
        assert not any(token.encode() in path.read_bytes() for token in tokens)


# splits


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of each of three classes, as a data set of the Hub would hold them."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    folder = tmp_path_factory.mktemp("images")
    features = Features(img=Image(), label=ClassLabel(names=["a", "b", "c"]))
    labels = torch.randperm(36, generator=torch.Generator().manual_seed(0)).remainder(3).tolist()
    for split in ("train", "test"):
        pictures = [PILImage.new("RGB", (4, 4), (label * 80, 0, 0)) for label in labels]
        Dataset.from_dict(dict(img=pictures, label=labels), features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_split_is_published_and_read_back(images, hub, monkeypatch, tmp_path, capsys):
    recipe = Recipe(dataset="cifar10", data_dir=str(images), imb_factor=0.1)
    count = len(hub.requests)
    assert set(publish_split(recipe, "org/cifar10_lt10", False, tmp_path).values()) == {"add"}
    assert not writes(hub, count)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    publish_split(recipe, "org/cifar10_lt10", True, tmp_path)
    assert "read back row by row" in capsys.readouterr().out
    assert set(publish_split(recipe, "org/cifar10_lt10", True, tmp_path).values()) == {"same"}
    monkeypatch.delenv("HF_TOKEN")
    found = read_split("org/cifar10_lt10", str(tmp_path / "cache"))
    expected = load_longtail("cifar10", str(images), imb_factor=0.1).train
    check_split(found, expected, "here")
    assert np.bincount(found["label"]).tolist() == [12, 3, 1]
    files = hub.repos["dataset", "org/cifar10_lt10"].files()
    assert set(files) == {"README.md", "data/train.parquet"}  # no images
    found["index"][0] += 1
    with pytest.raises(RunError, match="column 'index'"):
        check_split(found, expected, "here")
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (dict(dataset="fashion_lt"), "name cifar10, cifar100 or a Hub id"),
        (dict(dataset="cifar10", imb_type="none"), "takes every row"),
    ],
)
def test_no_split_to_publish(recipe, message, tmp_path):
    with pytest.raises(InputError, match=message):
        publish_split(Recipe(**recipe), "org/x", False, tmp_path)

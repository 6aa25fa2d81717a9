"""Training that ends on the Hub: `train_accelerate.py --push-to-hub`, and what it refuses before it trains."""

import json
import shutil

import pytest
import timm
import torch
from double import READER, STRANGER, WRITER
from journeys import flags_of
from publish import RELEASE
from release_files import COMMIT

from ride_timm.training import run_folder

NAME = "test_ride_resnet.colours"


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    monkeypatch.setattr(run_folder, "_commit", lambda: COMMIT)


@pytest.fixture
def short(colours, tmp_path):
    """Flags of a run of one epoch and a router."""
    return flags_of(colours, tmp_path / "run", "--epochs", "1", "--router-epochs", "1")


def test_a_trained_run_is_staged_verified_and_pushed(train, short, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert train([*short, "--push-to-hub", f"alice/{NAME}"]) == 0
    assert f"published {hub.endpoint}/alice/{NAME}, downloaded and verified" in capsys.readouterr().out
    repo = hub.repos["model", f"alice/{NAME}"]
    assert repo.tags == {RELEASE: repo.main}
    staged = tmp_path / "run" / "hub" / NAME
    assert {path.name for path in staged.iterdir()} == {*repo.files(), "verified.json"}
    recipe = hub.content(repo.files()["recipe.yaml"]).decode()
    assert str(tmp_path) not in recipe and json.loads(hub.content(repo.files()["results.json"]))["commit"] == COMMIT

    images = torch.rand(2, 3, 32, 32)
    model = timm.create_model(f"hf-hub:alice/{NAME}", pretrained=True, cache_dir=str(tmp_path / "cache")).eval()
    own = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    torch.testing.assert_close(model(images), own(images))

    main = repo.main
    assert train(["--output", tmp_path / "run", "--resume", "--push-to-hub", f"alice/{NAME}"]) == 0
    assert "is finished" in capsys.readouterr().out and repo.main == main


def test_an_upload_that_fails_leaves_the_run_and_a_way_to_repeat_it(train, short, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub.faults.append(dict(match="/commit/main", method="POST", status=500, times=9))
    flags = ["--push-to-hub", "alice/test_ride_resnet.again"]
    assert train([*short, *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is finished, but not pushed: the upload to alice/test_ride" in error and "pass --resume" in error
    assert not hub.repos["model", "alice/test_ride_resnet.again"].tags
    hub.faults.clear()
    assert train(["--output", tmp_path / "run", "--resume", *flags]) == 0
    assert RELEASE in hub.repos["model", "alice/test_ride_resnet.again"].tags


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (WRITER, "beetles", "'beetles': expected NAME.TAG"),
        (WRITER, "alice/beetles", "'beetles': expected NAME.TAG"),
        (WRITER, "org/test_ride_resnet.My-Tag", "with TAG in lower case"),
        (WRITER, "ride_resnet32.beetles", "names a ride_resnet32, the recipe trains a test_ride_resnet"),
        (None, NAME, "a push needs a token"),
        ("hf_nobodyknowsthisone", NAME, "refused your login (401)"),
        (READER, NAME, "the token of alice is read-only"),
        (STRANGER, NAME, "bob may not write to org"),
    ],
)
def test_refusals_come_before_the_training(train, short, tmp_path, hub, monkeypatch, capsys, token, name, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    repos = set(hub.repos)
    assert train([*short, "--push-to-hub", name]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line and set(hub.repos) == repos and not (tmp_path / "run").exists()


def test_a_release_that_exists_is_not_trained_again(train, short, published, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert train([*short, "--model", "ride_resnet32", "--push-to-hub", published]) == 2
    assert f"release {RELEASE} of {published} exists: choose another tag" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tag_of_other_classes(train, short, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert train([*short, "--model", "ride_resnet32", "--push-to-hub", "alice/ride_resnet32.cifar100_lt100"]) == 2
    assert "the source has 3 classes, the tag ride_resnet32.cifar100_lt100 has 100" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_script_or_a_machine_that_cannot_release(train, script, short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "_commit", lambda: f"{COMMIT}+dirty")
    assert train([*short, "--push-to-hub", NAME]) == 2
    assert "uncommitted changes" in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "_commit", lambda: None)
    assert train([*short, "--push-to-hub", NAME]) == 2
    assert "the code is in no git clone" in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "_commit", lambda: COMMIT)
    monkeypatch.setattr("release.find_spec", lambda name: None)
    assert train([*short, "--push-to-hub", NAME]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    shutil.copy(script.__file__, tmp_path / "train_accelerate.py")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "train_accelerate.py"))
    assert train([*short, "--push-to-hub", NAME]) == 2
    assert "needs the folder hub/ beside the script" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

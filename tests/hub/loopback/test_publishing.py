"""Push a release and a split to a Hub with the real clients; refusals come before anything is sent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import folder
import numpy as np
import publish as publish_script
import pytest
import release as release_script
import safetensors.torch
import spaces
import stage
import tables
import torch
import verify as verify_script
from card import write_card
from double import READER, STRANGER, WRITER
from huggingface_hub import HfApi, ModelCard, get_token, snapshot_download
from publish import RELEASE, main, publish
from release_files import set_json
from spaces import publish_space
from splits import check_split, publish_split, read_split
from verify import verify

from ride_timm import InputError, RunError
from ride_timm.cli.process import exit_code
from ride_timm.data.load import load_longtail
from ride_timm.models.release import sha256_of
from ride_timm.training.recipe import Recipe

NAME = "ride_resnet32.fashion_lt"


def writes(hub, since):
    """Requests that may change a repository; paths-info only asks."""
    changing = [line for line in hub.requests[since:] if line.split()[0] in ("POST", "PUT", "DELETE")]
    return [line for line in changing if "/paths-info/" not in line]


def test_a_dry_run_lists_the_files_without_a_network(release, hub, capsys):
    count = len(hub.requests)
    publish(release, f"org/dry.{NAME}", push=False)
    assert len(hub.requests) == count
    out = capsys.readouterr().out
    assert f"dry run, nothing is sent; --push would upload to {hub.endpoint}/org/dry.{NAME}:" in out
    assert f"and tag it {RELEASE}" in out and "verified.json" not in out
    assert all(file in out for file in release.hashes())


def test_a_base_model_that_is_not_on_the_hub_is_a_notice(published, release, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    staged = folder.Staged(NAME, Path(shutil.copytree(release.path, tmp_path / NAME)))
    for base, missing in ((None, False), (published, False), (f"org/elsewhere.{NAME}", True)):
        card = ModelCard.load(staged.path / "README.md")
        card.data.base_model = base
        card.save(staged.path / "README.md")
        publish_script.check_base(staged)
        assert (f"names {base} as its base_model" in capsys.readouterr().err) == missing


def test_what_was_pushed_from_nothing(published, release, hub):
    repo = hub.repos["model", published]
    files = repo.files(RELEASE)
    assert set(files) == set(release.hashes()) and "verified.json" not in files
    assert all(hub.content(files[path.name]) == path.read_bytes() for path in release.path.iterdir()
               if path.name in files)  # fmt: skip
    info = HfApi(token=False).model_info(published)
    assert info.card_data.library_name == "timm" and info.card_data.license == "mit"
    assert [example["src"] for example in info.card_data.widget] == [
        name for name in sorted(files) if "example" in name
    ]
    assert info.card_data.widget[0]["example_title"] == "T-shirt/top (1,000 training images)"
    (index,) = info.card_data.to_dict()["model-index"]
    names = [metric["name"] for metric in index["results"][0]["metrics"]]
    assert {f"accuracy, {g}, {kind}" for g in ("all", "many", "medium", "few") for kind in ("ensemble", "routed")} <= {
        *names
    }


def test_pushing_again_changes_nothing(published, release, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    before = hub.repos["model", published].main
    publish(release, published, push=True)
    assert hub.repos["model", published].main == before


def test_a_changed_card_is_pushed_and_the_tag_stays(copy_of, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    repo = f"alice/{NAME}"
    publish(copy_of, repo, push=True)
    tagged = hub.repos["model", repo].tags[RELEASE]
    set_json(copy_of.path / "results.json", seconds=7200.0)
    write_card(copy_of)
    verify(copy_of)
    publish(copy_of, repo, push=True)
    assert "2.0 hours" in ModelCard.load(repo, token=WRITER).text
    assert hub.repos["model", repo].tags[RELEASE] == tagged != hub.repos["model", repo].main


def test_a_release_does_not_change_its_weights(published, copy_of, hub, monkeypatch):
    weights, config = copy_of.path / "model.safetensors", copy_of.json("config.json")
    change_weights(weights, 1e-6)
    (copy_of.path / "config.json").write_text(json.dumps(config | dict(sha256=sha256_of(weights)), indent=2))
    write_card(copy_of)
    verify(copy_of)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    count = len(hub.requests)
    with pytest.raises(InputError, match=rf"release {RELEASE} .* exists with other weights"):
        publish(copy_of, published, push=True)
    assert not writes(hub, count)


@pytest.mark.parametrize(
    ("token", "owner", "message"),
    [
        (None, "org", "a push needs a token"),
        ("hf_nobodyknowsthisone", "org", "refused your login (401)"),
        (READER, "org", "the token of alice is read-only"),
        (STRANGER, "org", "bob may not write to org"),
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
    with pytest.raises(InputError, match=r"changed since it was verified \(README\.md\)"):
        publish(copy_of, "org/x", push=True)
    with pytest.raises(InputError, match=r"README\.md is not the card of its data"):
        verify(copy_of)
    with pytest.raises(InputError, match=r"is missing or damaged: python hub/verify\.py"):
        publish(copy_of, "org/x", push=True)
    assert len(hub.requests) == count


def test_an_upload_that_breaks_off_leaves_no_release(release, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hub.faults.append(dict(match="/commit/main", method="POST", status=500, times=9))
    with pytest.raises(RunError, match="the upload to org/broken failed; run it again"):
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


# the release in one command


@pytest.fixture
def house(tmp_path, monkeypatch):
    """hub/ with its pages and the package's table of releases, as copies that a test may change."""
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(folder, "RELEASES", Path(shutil.copy(folder.RELEASES, tmp_path)))
    for module in (folder, stage, verify_script, publish_script, release_script, tables):
        monkeypatch.setattr(module, "HERE", root)
    pages = dict(tags=(tmp_path / "tags.md", tables.render_tags),
                 results=(tmp_path / "results.md", lambda: tables.render_results(root)),
                 summary=(tmp_path / "summary.md", lambda: tables.render_summary(root)))  # fmt: skip
    for name, (page, _) in pages.items():
        page.write_text(f"<!-- {name}: rendered by hub/tables.py -->\n<!-- {name}: end -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "PAGES", pages)
    return tmp_path


def snapshot(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def release_command(house, run, *flags):
    return exit_code(release_script.main, [NAME, "--from", str(run), "--root", str(house / "hub"), *flags])


def test_a_release_in_one_command(house, run, hub, monkeypatch, capsys):
    count = len(hub.requests)
    monkeypatch.delenv("RIDE_TIMM_HUB")
    assert release_command(house, run, "--space") == 0
    out = capsys.readouterr().out
    assert "dry run" in out and f"{hub.endpoint}/ride-timm/{NAME}:" in out and "% measured, " in out
    assert len(hub.requests) == count
    staged = folder.Staged.find(NAME, house / "hub")
    sha256 = staged.hashes()["model.safetensors"]
    assert folder.read_releases()[NAME]["sha256"] == sha256 and "published" not in folder.read_releases()[NAME]
    assert f"[staged]({NAME})" in (house / "tags.md").read_text(encoding="utf-8")
    assert all(NAME in (house / page).read_text(encoding="utf-8") for page in ("results.md", "summary.md"))

    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert release_command(house, run, "--push", "--space") == 0
    assert ("space", f"ride-timm/{NAME}") in hub.repos
    repo = hub.repos["model", f"ride-timm/{NAME}"]
    assert {file["lfs"] for file in repo.files(RELEASE).values()} >= {sha256}
    assert folder.read_releases()[NAME]["published"] is True
    assert f"[published](https://huggingface.co/ride-timm/{NAME})" in (house / "tags.md").read_text(encoding="utf-8")
    assert [path.name for path in (house / "hub").iterdir()] == [NAME]  # no scratch folder is left


@pytest.mark.parametrize(
    ("token", "spoil", "message"),
    [
        (None, None, "a push needs a token"),
        ("hf_nobodyknowsthisone", None, "refused your login (401)"),
        (READER, None, "the token of alice is read-only"),
        (STRANGER, None, "bob may not write to org"),
        (WRITER, lambda run: (run / "results.json").unlink(), "has no results.json"),
        (WRITER, lambda run: set_json(run / "results.json", commit="abc+dirty"), "uncommitted changes"),
        (WRITER, lambda run: set_json(run / "config.json", num_classes=7), "7 classes, the tag"),
        (WRITER, lambda run: set_json(run / "config.json", architecture="ride_resnet50"), "holds a ride_resnet50"),
        (WRITER, lambda run: change_weights(run / "model.safetensors", 1.0), "the weights are of another run"),
        (WRITER, lambda run: change_weights(run / "model.safetensors", 1e-7), f"release {RELEASE} of org/{NAME}"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_before_anything_is_written(
    published, house, run, hub, monkeypatch, capsys, token, spoil, message
):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if spoil:
        run = Path(shutil.copytree(run, house / "run"))
        spoil(run)
    before, count = snapshot(house), len(hub.requests)
    assert release_command(house, run, "--push") in (1, 2)
    assert message in capsys.readouterr().err
    assert snapshot(house) == before and not writes(hub, count)


def change_weights(path, amount):
    tensors = safetensors.torch.load_file(path)
    tensors["trunk.conv1.weight"] += amount
    safetensors.torch.save_file(tensors, path)


def test_a_space_holds_all_that_it_runs(published, hub, monkeypatch, tmp_path, capsys):
    count = len(hub.requests)
    publish_space(published, push=False)
    assert f"and its demo to {hub.endpoint}/spaces/org/{NAME}: README.md, app.py" in capsys.readouterr().out
    assert len(hub.requests) == count
    monkeypatch.setenv("HF_TOKEN", WRITER)
    publish_space(published, push=True)
    assert f"published {hub.endpoint}/spaces/org/{NAME}" in capsys.readouterr().out
    monkeypatch.delenv("HF_TOKEN")
    folder = snapshot_download(f"org/{NAME}", repo_type="space", local_dir=tmp_path)
    code = f"""
from pathlib import Path
import ride_timm
from ride_timm.inference.demo.opinions import load_demo
demo = load_demo("hf-hub:org/{NAME}", "cpu")
print(Path(ride_timm.__file__).parent.parent == Path.cwd(), demo.name, len(demo.settings) > 2, sum(demo.train_images))
"""
    assert f'load_demo("hf-hub:org/{NAME}")' in (Path(folder) / "app.py").read_text(encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert ran.stdout == f"True {NAME} True 2478\n", ran.stdout + ran.stderr


def test_a_space_that_arrives_otherwise_is_reported(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with monkeypatch.context() as patched:
        patched.setattr(spaces, "FILES", ("README.md", "app.py"))
        publish_space("org/damaged_space", push=True)
    repo = hub.repos["space", "org/damaged_space"]
    assert set(repo.files()) >= {"README.md", "app.py"} and "requirements.txt" not in repo.files()
    monkeypatch.setattr(spaces, "upload", lambda *_: repo.main)
    with pytest.raises(RunError, match=r"spaces/org/damaged_space does not hold the files that were sent"):
        publish_space("org/damaged_space", push=True)


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
    publish_split(recipe, "org/cifar10_lt10", False, tmp_path)
    assert "data/train.parquet" in capsys.readouterr().out and len(hub.requests) == count
    monkeypatch.setenv("HF_TOKEN", WRITER)
    publish_split(recipe, "org/cifar10_lt10", True, tmp_path)
    assert "read back row by row" in capsys.readouterr().out
    before = hub.repos["dataset", "org/cifar10_lt10"].main
    publish_split(recipe, "org/cifar10_lt10", True, tmp_path)
    assert hub.repos["dataset", "org/cifar10_lt10"].main == before
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

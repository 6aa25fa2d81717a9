"""A Hub on loopback, started before any client is imported, and a release to send there."""

import os
import tempfile

from double import WRITER, Hub

HUB = Hub()
HOME = tempfile.TemporaryDirectory(prefix="loopback-home-")  # goes when the process does
os.environ |= {
    "HF_ENDPOINT": HUB.endpoint,
    "HF_HOME": HOME.name,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_ETAG_TIMEOUT": "3",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}
for name in ("HF_TOKEN", "RIDE_TIMM_HUB", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)

import shutil  # noqa: E402

import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from folder import Staged  # noqa: E402
from measure import measure  # noqa: E402
from publish import publish  # noqa: E402
from release_files import COMMIT, set_json  # noqa: E402
from stage import stage  # noqa: E402
from verify import data_of, verify  # noqa: E402

from ride_timm.data.augment.policies import get_policy  # noqa: E402
from ride_timm.training.recipe import load_recipe  # noqa: E402
from ride_timm.training.run_folder import RunFolder  # noqa: E402
from ride_timm.training.state import TrainingState  # noqa: E402

NAME = "ride_resnet32.fashion_lt"
SMALL = dict(num_experts=2, layer2_output_dim=16, layer3_output_dim=16)


@pytest.fixture(scope="session")
def hub():
    yield HUB
    HUB.stop()


@pytest.fixture(autouse=True)
def quiet_hub(hub, monkeypatch):
    """No faults, no login, and the namespace `org`, unless a test sets others."""
    hub.faults.clear()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("RIDE_TIMM_HUB", "org")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder of a small network with a router, as training leaves it, with measured metrics."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "small")
    recipe = load_recipe("fashion_lt").override(dict(SMALL, mixed_precision="no", epochs=1))
    torch.manual_seed(0)
    model = timm.create_model("ride_resnet32", num_classes=10, router=True, top_choices_num=5, **SMALL).eval()
    found = measure(model, recipe)
    folder.begin(recipe, TrainingState())
    folder.export(model, get_policy("fashion").data_config(28), tuple(found["class_names"]))
    stages = {stage: metrics | dict(epochs=1) for stage, metrics in found["stages"].items()}
    facts = dict(num_processes=1, class_counts=found["class_counts"], seconds=1.0)
    folder.write_results(recipe, torch.device("cpu"), stages, **facts)
    set_json(folder.path / "results.json", commit=COMMIT)
    return folder.path


@pytest.fixture(scope="session")
def release(run, tmp_path_factory):
    """The run, staged and verified."""
    staged = stage(run, NAME, tmp_path_factory.mktemp("hub"))
    verify(staged, data_of(staged, None, False))
    return staged


@pytest.fixture(scope="session")
def published(release, hub):
    """The release in the namespace `org`, pushed from nothing; gives its id."""
    repo = f"org/{NAME}"
    os.environ["HF_TOKEN"] = WRITER
    try:
        publish(release, repo, push=True)
    finally:
        del os.environ["HF_TOKEN"]
    return repo


@pytest.fixture
def copy_of(release, tmp_path):
    """A copy of the staged release that a test may change."""
    return Staged(release.name, shutil.copytree(release.path, tmp_path / "hub" / release.name))


@pytest.fixture
def files(release):
    """The release as bytes by file name, for a repository made without a client."""
    return {path.name: path.read_bytes() for path in release.path.iterdir() if path.name != "verified.json"}

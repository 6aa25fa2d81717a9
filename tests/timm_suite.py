"""Run timm's own model tests, of the installed version, on our networks: `python tests/timm_suite.py [NAME …]`.

Without names: the tiny network and bare `ride`; `all`: every name. The tests come from timm's source distribution, read
from the folder TIMM_SDIST or downloaded from the package index; if it is unavailable, nothing runs and a line says so.
As a pytest plugin (it loads itself) this file limits timm's list to our networks, adds them to the tests selected by
module name, and sends token networks to timm's tests of ViTs.

Selected: 11 tests a name and one more for every further tag; none is skipped or expected to fail. Excluded: tests of
networks that timm names; tests of published weights (`test_model_inference`, `…_load_pretrained`,
`…_features_pretrained`) until a tag has some; `test_model_forward_features` for `ride_vit_*`, as for timm's own ViTs
(NON_STD_FILTERS), which leaves 10. Do not edit the package meanwhile: TorchScript reads its source files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

QUICK = ("ride", "test_ride_resnet")
TOKENS = ("ride_vit_*",)  # as timm's NON_STD_FILTERS name its own vit_*

_list_models, _list_pretrained = timm.list_models, timm.list_pretrained


def chosen() -> list[str]:
    names = os.environ["RIDE_SUITE"].split()
    return [*_list_models("ride*"), "test_ride_resnet"] if names == ["all"] else names


def pytest_configure(config) -> None:
    def ours(found):
        return [name for name in found if name.partition(".")[0] in chosen()]

    def list_models(filter="", module="", exclude_filters="", **kwargs):
        if isinstance(module, list):
            module = ""  # selects timm's families by module
        if "vit_*" in filter:
            filter = [*filter, *TOKENS]
        if "vit_*" in exclude_filters:
            exclude_filters = [*exclude_filters, *TOKENS]
        return ours(_list_models(filter, module, exclude_filters=exclude_filters, **kwargs))

    timm.list_models = list_models
    timm.list_pretrained = lambda *args, **kwargs: ours(_list_pretrained(*args, **kwargs))


def pytest_collection_modifyitems(config, items) -> None:
    def is_ours(item) -> bool:
        name = getattr(getattr(item, "callspec", None), "params", {}).get("model_name", "")
        return isinstance(name, str) and name.partition(".")[0] in chosen()

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]


def fetch(folder: Path) -> Path | None:
    """Download and unpack timm's source distribution; None if the index does not have it."""
    command = [sys.executable, "-m", "pip", "download", "-q", f"timm=={timm.__version__}"]
    command += ["--no-deps", "--no-binary", "timm", "--dest", str(folder)]
    if subprocess.run(command).returncode:
        return None
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"timm-{timm.__version__}"


def main(names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(os.environ["TIMM_SDIST"]) if "TIMM_SDIST" in os.environ else fetch(Path(scratch))
        if source is None:
            print(f"skipped: no source distribution of timm {timm.__version__}")
            return 0
        command = [sys.executable, "-m", "pytest", "-p", "ride_timm", "-p", "timm_suite", "--import-mode=importlib"]
        command += ["-p", "no:cacheprovider", "-q", "-rs", "-W", "ignore", str(source / "tests" / "test_models.py")]
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        # PYTHONSAFEPATH: the timm next to the tests must not shadow the installed one
        settings = dict(PYTHONSAFEPATH="1", HF_HUB_OFFLINE="1", RIDE_SUITE=" ".join(names or QUICK), PYTHONPATH=path)
        return subprocess.run(command, env=os.environ | settings, cwd=scratch).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

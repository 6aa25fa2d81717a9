"""Hostile files and files that are not checkpoints: nothing is executed."""

import builtins
import io
import pickle
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from authors_files import save, tiny

from ride_timm import load_legacy
from ride_timm.errors import InputError
from ride_timm.models.load import load_model


@pytest.fixture
def parse_config(monkeypatch):
    """The authors' module with its ConfigParser, removed once the file is written."""
    module = types.ModuleType("parse_config")

    class ConfigParser:
        def __init__(self):
            self._config = {"arch": {"type": "ResNet32Model"}, "n_gpu": 1}
            self._save_dir = Path("saved/models")
            self.children = [self]

    ConfigParser.__module__, ConfigParser.__qualname__ = "parse_config", "ConfigParser"
    module.ConfigParser = ConfigParser
    monkeypatch.setitem(sys.modules, "parse_config", module)
    return module


def test_a_pickled_config_parser_of_a_missing_module(tmp_path, parse_config, monkeypatch):
    path = save(tmp_path / "model.pth", tiny(), config=parse_config.ConfigParser(), criterion=parse_config.ConfigParser)
    monkeypatch.delitem(sys.modules, "parse_config")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    model = load_legacy(path)
    assert model.num_experts == 2 and "parse_config" not in sys.modules


class Hostile:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_calls(marker: Path):
    import os

    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Hostile(os.system, f"touch '{marker}'"),
        "subprocess": Hostile(subprocess.check_call, ["touch", str(marker)]),
        "exec": Hostile(builtins.exec, code),
        "eval": Hostile(builtins.eval, code),
        "open": Hostile(io.open, str(marker), "w"),
        "method": Hostile(Path.touch, marker),
    }


@pytest.mark.parametrize("kind", ["os.system", "subprocess", "exec", "eval", "open", "method"])
@pytest.mark.parametrize("place", ["config", "state_dict", "root"])
def test_hostile_pickles_do_nothing(tmp_path, kind, place):
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    call = hostile_calls(marker)[kind]
    if place == "config":
        save(path, tiny(), config=call)
    elif place == "state_dict":
        save(path, tiny() | {"backbone.conv1.weight": call})
    else:
        torch.save(call, path)
    try:
        model = load_legacy(path)
    except InputError as error:
        assert str(path) in str(error)
    else:  # an inert object beside the tensors
        assert place == "config" and model.num_experts == 2
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the trap was live
    assert marker.exists()


def test_a_hostile_pickle_in_the_old_format(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    path.write_bytes(pickle.dumps({"state_dict": tiny(), "config": hostile_calls(marker)["exec"]}))
    with pytest.raises(InputError, match="not a readable torch checkpoint"):
        load_legacy(path)
    assert not marker.exists()


# Other files


def test_truncated_files(tmp_path):
    whole = save(tmp_path / "whole.pth", tiny()).read_bytes()
    path = tmp_path / "cut.pth"
    for size in (0, 1, 4, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"{re.escape(str(path))}: not a readable torch checkpoint"):
            load_legacy(path)


def test_weights_that_are_not_finite(tmp_path):
    weights = tiny()
    weights["backbone.conv1.weight"][0, 0, 0] = float("nan")
    path = save(tmp_path / "nan.pth", weights)
    with pytest.raises(InputError, match=r"nan\.pth: 3 of the 432 values of conv1\.weight are NaN or infinite"):
        load_legacy(path)


def test_a_damaged_pickle(tmp_path):
    whole = save(tmp_path / "whole.pth", tiny())
    path = tmp_path / "damaged.pth"
    for at in (2, 20, 100, 400, 900):
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                data = source.read(entry)
                if entry.filename.endswith("data.pkl"):
                    data = data[:at] + b"\xff\x00\x93R" + data[at + 4 :]
                target.writestr(entry, data)
        with pytest.raises(InputError):
            load_legacy(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable torch checkpoint"),
        (b"not a checkpoint at all\n" * 50, "not a readable torch checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "not a readable torch checkpoint"),
    ],
)
def test_files_that_are_not_checkpoints(tmp_path, content, message):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    for load in (load_legacy, load_model):
        with pytest.raises(InputError, match=message):
            load(path)


@pytest.mark.parametrize(
    "content",
    [{"state_dict": None}, {"state_dict": {"a": 1}}, [1, 2], torch.zeros(3), {"epoch": 3}, {"state_dict": {7: 8}}],
    ids=str,
)
def test_checkpoints_of_other_things(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(InputError, match="expected a dict of tensors under 'state_dict'"):
        load_legacy(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ({}, "conv1.weight"),
        ({"fc.weight": torch.zeros(3, 4)}, "conv1.weight"),
        ({"conv1.weight": torch.zeros(16, 3, 3, 3)}, "linear.weight"),
    ],
)
def test_checkpoints_of_other_networks(tmp_path, content, missing):
    torch.save({"state_dict": content}, tmp_path / "model.pth")
    with pytest.raises(InputError, match=f"not a RIDE checkpoint of the authors: tensor '{missing}' is missing"):
        load_legacy(tmp_path / "model.pth")


def test_a_zip_of_other_things(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match="not a readable torch checkpoint"):
        load_legacy(path)


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pth: no such file"):
        load_legacy(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="no such file"):
        load_legacy(tmp_path)

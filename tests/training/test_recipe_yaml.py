"""Hand-written recipe files."""

import dataclasses

import pytest
import yaml

from ride_timm import InputError
from ride_timm.training.recipe import Recipe, load_recipe


def test_yaml_states_every_key():
    assert set(yaml.safe_load(Recipe().to_yaml())) == {item.name for item in dataclasses.fields(Recipe)}


def test_bad_keys_of_a_recipe_file_are_listed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 3\nlr: 0.1\non: 1\n")
    with pytest.raises(InputError, match=r"mine\.yaml: unknown key learning_rate, on; the keys are dataset, "):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("mixed_precision: no", dict(mixed_precision="no")),
        ("use_norm: yes", dict(use_norm=True)),
        ("distillation: On\nuse_norm: off\nsync_bn: False", dict(distillation=True, use_norm=False, sync_bn=False)),
        ("lr: 1e-3", dict(lr=0.001)),
        ("epochs: 10.0", dict(epochs=10)),
        ("epochs: 1e2", dict(epochs=100)),
        ("lr: '0.2'\nepochs: \"20\"\nuse_norm: 'false'", dict(lr=0.2, epochs=20, use_norm=False)),
        ("seed: 010", dict(seed=10)),
        ("seed: 1_000", dict(seed=1000)),
        ("decay_epochs: [1e1, 2_0]", dict(decay_epochs=(10, 20))),
        ("decay_epochs:\n- 10\n- 20", dict(decay_epochs=(10, 20))),
        ("decay_epochs: 7", dict(decay_epochs=(7,))),
        ("decay_epochs: []", dict(decay_epochs=())),
        ("data_dir: null\ninput_size: ~\nclip_grad:\nema_decay: none", dict(data_dir=None, input_size=None)),
        ("name: 2024-01-01\nsplit: '1:30'", dict(name="2024-01-01", split="1:30")),
        ("name: no\nsplit: 010", dict(name="no", split="010")),
        ("name: ''", dict(name="")),
        ("# nothing yet", dict(lr=0.1)),
        ("", dict(lr=0.1)),
        ("lr: 0.2  # halved\nepochs: 5\n", dict(lr=0.2, epochs=5)),
    ],
)
@pytest.mark.parametrize(
    "encode", [str.encode, lambda text: text.replace("\n", "\r\n").encode("utf-8-sig")], ids=["", "windows"]
)
def test_hand_written_yaml(tmp_path, text, values, encode):
    path = tmp_path / "mine.yaml"
    path.write_bytes(encode(text))
    recipe = load_recipe(path)
    assert {key: getattr(recipe, key) for key in values} == values
    assert recipe == dataclasses.replace(Recipe(name="mine"), **values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"lr: [\n", r"mine\.yaml is not valid YAML: line 2: expected the node content"),
        (b"lr: 1\n  epochs: 2\n", r"is not valid YAML: line 2: mapping values are not allowed here"),
        (b"lr: 1\nepochs: 2\nlr: 2\n", r"is not valid YAML: line 3: key lr is given twice\.$"),
        (b"? [a]\n: 1\n", r"is not valid YAML: line 1: found unhashable key"),
        (b"---\nlr: 1\n---\nlr: 2\n", r"is not valid YAML: line 3: but found another document"),
        (b"decay_epochs: [&a [1, 1], [*a, *a]]\n", r"is not valid YAML: line 1: aliases are not for recipes"),
        (b"[" * 5000, r"is nested too deeply: expected `key: value` lines"),
        (b"- lr\n", r"expected `key: value` lines"),
        (b"lr:1\n", r"expected `key: value` lines"),
        ("lr: 1\n".encode("utf-16"), r"mine\.yaml is UTF-16 text: save it as UTF-8\."),
        ("name: Käfer\n".encode("latin-1"), r"mine\.yaml is not UTF-8 text\."),
        (b"seed: 1:30\n", r"^seed='1:30': expected a whole number\.$"),
        (b"seed: 0x10\n", r"^seed='0x10': expected a whole number\.$"),
        (b"seed: 2024-01-01\n", r"^seed='2024-01-01': expected a whole number\.$"),
        (b"seed: 2.5\n", r"^seed='2\.5': expected a whole number\.$"),
        (b"seed: 9007199254740993\n", r"^seed='9007199254740993': .* at most 9007199254740992"),
        (b"lr: 0,1\n", r"^lr='0,1': expected a number\.$"),
        (b"lr: [1, 2]\n", r"^lr=\['1', '2'\]: expected a number\.$"),
        (b"lr: .inf\n", r"^lr='\.inf': expected a number\.$"),
        (b"lr:\n", r"^lr=None: expected a value\.$"),
        (b"use_norm: 1\n", r"^use_norm='1': expected true or false\.$"),
        (b"mixed_precision: off\n", r"^mixed_precision='off': expected one of no, bf16, fp16\.$"),
        (b"name: {a: b}\n", r"^name=\{'a': 'b'\}: expected a string\.$"),
    ],
)
def test_unreadable_recipe_files_are_rejected(tmp_path, data, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_recipe(path)

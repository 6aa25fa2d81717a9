"""Cards of releases against their data."""

import json
import os
import re
from pathlib import Path

import pytest
from card import render
from card_text import describe_data
from release_files import TAG, front_matter, set_json
from stage import stage
from verify import verify

from ride_timm import InputError


def test_the_card_says_what_the_data_say(staged):
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    front = front_matter(text)
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"
    assert {"timm", "transformers"} < set(front["tags"]) and '\npip install ".[transformers]"' in text
    assert front["license"] == "mit" and front["metrics"] == ["accuracy"]
    metrics = {m["name"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["accuracy, all, ensemble"] == 50.0 and metrics["accuracy, many, routed"] == 60.0
    assert not [name for name in metrics if "few" in name]  # there are no few-shot classes: nothing is made up
    assert "| ensemble | 50.0 | 60.0 | 50.0 | – | 100.0 |" in text and "| 50.0 / 25.0 / 25.0 % |" in text
    assert "20 % (drone, 30 training images)" in text and "One seed; the spread" in text and "2 minutes" in text
    assert (
        "forward_routed" in text
        and "| 600, from 300 to 30 per class |" in text
        and "| 3 many, 1 medium, 0 few |" in text
        and "{{" not in text
        and "None," not in text
    )
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        compile(block, "card", "exec")
    assert len(blocks) == 2 and f'pipeline("image-classification", model="owner/{TAG}")' in blocks[1]


@pytest.mark.parametrize(
    ("threshold", "cell"),
    [
        (1.0, "1"),
        (0.2669864, "0.266986"),
        (0.9997906, "0.999791"),
        (1 - 2**-24, "1 - 5.96e-08"),  # the largest below 1 in single precision
        (0.0, "0"),
    ],
)
def test_a_threshold_is_that_of_its_row(staged, threshold, cell):
    point = dict(threshold=threshold, macs=1e6, all=50.0, many=None, medium=50.0, few=50.0, experts_used=[1.0, 0.0])
    set_json(staged.path / "results.json", routing=dict(curve=[point]))
    assert f"\n| {cell} | 1.0 | 50.0 | – |" in render(staged)


def test_seeds_give_a_spread(make_run, run, tmp_path):
    other = make_run(seed=1, accuracy=52.0, router=True, top_choices_num=3)
    text = (stage(run, TAG, tmp_path, seeds=(other,)).path / "README.md").read_text(encoding="utf-8")
    assert "| ensemble | 51.0 ± 1.4 | 60.0 ± 0.0 |" in text and "over seeds 0, 1:" in text
    with pytest.raises(InputError, match="expected different ones"):
        stage(run, TAG, tmp_path, seeds=(run,))
    with pytest.raises(InputError, match=r"differs in more than the seed: num_experts"):
        stage(run, TAG, tmp_path, seeds=(make_run(seed=2, num_experts=2),))
    set_json(other / "results.json", source="/home/somebody/run")
    with pytest.raises(InputError, match=r"only one of .* started from trained weights"):
        stage(run, TAG, tmp_path, seeds=(other,))


def test_a_staged_release_takes_further_seeds(make_run, run, tmp_path):
    def seeds_of(staged):
        return [facts["seed"] for facts in json.loads((staged.path / "results.json").read_text("utf-8"))["seeds"]]

    staged = stage(run, TAG, tmp_path, seeds=(make_run(seed=1, accuracy=52.0),))
    set_json(staged.path / "results.json", source=None)  # it began from somebody's own weights
    third = make_run(seed=2, accuracy=54.0)
    set_json(third / "results.json", source="/home/somebody/run")
    before = seeds_of(staged)
    kept = {path.name: path.read_bytes() for path in staged.path.iterdir() if path.suffix in (".safetensors", ".png")}
    again = stage(staged.path, TAG, tmp_path, seeds=(third,))
    assert seeds_of(again) == [*before, 2]
    assert {name: (again.path / name).read_bytes() for name in kept} == kept
    assert "| ensemble | 52.0 ± 2.0 |" in (again.path / "README.md").read_text(encoding="utf-8")
    again_one = make_run(seed=1)
    set_json(again_one / "results.json", source="/home/somebody/run")
    with pytest.raises(InputError, match="expected different ones"):
        stage(again.path, TAG, tmp_path, seeds=(again_one,))
    assert seeds_of(again) == [*before, 2]


def test_a_staged_release_stands_when_its_new_folder_cannot_take_its_place(make_run, run, tmp_path, monkeypatch):
    staged = stage(run, TAG, tmp_path)
    replace = os.replace

    def refuse(source, target):
        if Path(target) == staged.path and Path(source).name != "old":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        stage(staged.path, TAG, tmp_path, seeds=(make_run(seed=1),))
    assert (staged.path / "model.safetensors").is_file() and (staged.path / "README.md").is_file()


def test_plain_networks_without_a_router(make_run, tmp_path):
    staged = stage(make_run(num_experts=1), TAG, tmp_path)
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    assert "with one expert" in text and "forward_routed" not in text and "router" not in text
    assert "1 experts" not in text and "`test_ride_resnet`, 1 expert |" in text
    assert verify(staged)["golden"] < 1e-4


@pytest.mark.parametrize(
    ("dataset", "imb_type", "imb_factor", "counts", "name"),
    [
        ("cifar10", "exp", 0.02, (500, 10), "CIFAR10-LT (imbalance factor 50)"),
        ("cifar10", "exp", 0.4, (500, 200), "CIFAR10-LT (imbalance factor 2.5)"),
        ("cifar10", "step", 0.02, (500, 10), "CIFAR10-LT (step, imbalance factor 50)"),
        ("cifar10", "none", 0.02, (5000, 644, 50), "CIFAR10-LT (ready-made, imbalance factor 100)"),
        ("cifar10", "none", 0.02, (5000, 0), "CIFAR10-LT"),  # no factor divides by an empty class
        ("imagenet_lt", "none", 0.02, (1280, 5), "ImageNet-LT"),  # its lists are what the name stands for
    ],
)
def test_training_images_are_named_with_their_imbalance(dataset, imb_type, imb_factor, counts, name):
    data = dict(dataset=dataset, imb_type=imb_type, imb_factor=imb_factor)
    assert describe_data(dict(data=data, class_counts=counts))[0] == name

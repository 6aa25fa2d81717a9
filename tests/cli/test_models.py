import json
from functools import cache

from commands import output

import ride_timm  # noqa: F401  (registers the models)
from ride_timm.cli.models import catalogue, describe, format_catalogue
from ride_timm.models.release import release_table


def test_a_network_with_its_costs():
    row = describe("ride_resnet32", num_experts=4)
    assert row["num_experts"] == 4 and row["num_classes"] == 100 and row["input_size"] == 32
    costs = [round(cost / 1e6, 1) for cost in row["macs_by_experts"]]
    assert costs[1:] == [76.4, 102.2, 128.0]  # as the authors count two, three and four experts
    assert row["macs"] == row["macs_by_experts"][-1] and len(row["expert_macs"]) == 4
    assert {"cifar100_lt100", "cifar100_lt100_6experts", "cifar10_lt100", "fashion_lt"} <= set(row["tags"])
    published = {tag for tag, release in release_table().items() if release.get("published")}
    assert {f"ride_resnet32.{tag}" for tag, known in row["tags"].items() if known} <= published


def test_the_table_has_a_line_for_each():
    rows = catalogue("ride_resnet[13][02]")
    assert [row["name"] for row in rows] == ["ride_resnet10", "ride_resnet32"]
    lines = format_catalogue(rows).splitlines()
    assert lines[0].split()[:8] == ["M", "params", "MMACs:", "trunk", "an", "expert", "1", "exp."]
    assert "102.2     32  cifar100_lt100, " in lines[3] and lines[2].endswith("imagenet_lt")
    rows[0]["tags"]["imagenet_lt"] = True
    assert format_catalogue(rows).splitlines()[2].endswith("imagenet_lt*")


def test_models_are_listed(capsys, monkeypatch):
    small = cache(lambda name: dict(describe("ride_resnet32"), name=name))  # counting each network's MACs takes long
    monkeypatch.setattr("ride_timm.cli.models.describe", small)
    rows = json.loads(output(capsys, "models", "--json"))
    names = [row["name"] for row in rows]
    assert {"ride_resnet10", "ride_resnet32", "ride_resnext101", "ride_swin_tiny", "ride"} <= set(names)
    assert not any(name.startswith("test_") for name in names)
    row = rows[names.index("ride_resnet32")]
    assert row["input_size"] == 32 and {"cifar100_lt100", "fashion_lt"} <= set(row["tags"]) and row["params"] > 700_000
    text = output(capsys, "models")
    assert all(name in text for name in names) and "cifar100_lt100" in text

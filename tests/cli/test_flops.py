import json

import pytest
import timm
from commands import output, refusal

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code


def test_flops_json(capsys):
    found = json.loads(output(capsys, "flops", "ride_resnet32", "--num-experts", 3, "--json"))
    assert set(found) == {"macs", "params", "expert_macs"}
    assert found["macs"] == pytest.approx(102.17e6, rel=1e-3) and len(found["expert_macs"]) == 3
    model = timm.create_model("ride_resnet32")
    assert found["params"] == sum(parameter.numel() for parameter in model.parameters())


def test_flops_under_routing(capsys):
    argv = ("flops", "ride_resnet32", "--num-experts", 3, "--experts-used", "40.99,9.47,49.54")
    found = json.loads(output(capsys, *argv, "--json"))
    assert found["expected_macs"] == pytest.approx(78_583_101, rel=1e-3)
    assert found["expected_macs"] < found["macs"]
    text = output(capsys, *argv)
    assert f"{found['macs']:,}" in text and f"{found['expected_macs']:,}" in text and "expert 3" in text


def test_flops_take_the_networks_arguments(capsys):
    argv = ("flops", "test_ride_resnet", "--num-experts", 2, "--num-classes", 7, "--no-use-norm", "--input-size", 64)
    found = json.loads(output(capsys, *argv, "--share-layer3", "--layer4-output-dim", 40, "--json"))
    kwargs = dict(num_experts=2, num_classes=7, use_norm=False, share_layer3=True, layer4_output_dim=40)
    model = timm.create_model("test_ride_resnet", **kwargs)
    assert found["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(found["expert_macs"]) == 2


def test_rounded_percentages(capsys):
    assert exit_code(main, ["flops", "test_ride_resnet", "--input-size", "32", "--experts-used=33.3,33.3,33.3"]) == 0
    assert "expected, routed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ("50,50", "2 fractions for 3 experts"),
        ("41,9,49.54", "41,9,49.54 sum to 99.54: expected percentages that sum to 100"),
        ("0.41,0.09,0.5", "0.41,0.09,0.5 sum to 1: expected percentages that sum to 100"),
        ("120,-20,0", "expected percentages that sum to 100, none below 0"),
        ("a,b,c", "expected percentages"),
        ("50,,50", "expected percentages"),
        ("nan,nan,nan", "sum to nan: expected percentages"),
    ],
)
def test_bad_percentages(capsys, used, message):
    assert message in refusal(capsys, "flops", "test_ride_resnet", "--input-size", 32, f"--experts-used={used}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-experts", "0"), "num_experts"),
        (("--num-experts", "1.5"), "num_experts"),
        (("--num-experts", "many"), "num_experts"),
        (("--num-experts", "1", "--experts-used", "100"), "at least 2"),
        (("--layer2-output-dim", "8"), "layer2_output_dim=8"),
        (("--layer4-output-dim", "64"), "layer4_output_dim"),
        (("--num-classes", "-3"), "num_classes=-3"),
        (("--num-classes", "ten"), "ten"),
        (("--threads", "0"), "threads=0"),
        (("--no-such-flag",), "no-such-flag"),
    ],
)
def test_bad_network_arguments(capsys, flags, message):
    assert message in refusal(capsys, "flops", "ride_resnet32", *flags)


def test_an_unknown_tag(capsys):
    assert "Invalid pretrained tag" in refusal(capsys, "flops", "ride_resnet32.nosuch")

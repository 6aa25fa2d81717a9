import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from ride_timm.cli.main import main
from ride_timm.cli.models import describe
from ride_timm.cli.process import exit_code
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION = dict(input_size=(3, 28, 28), mean=(0.286,) * 3, std=(0.353,) * 3, crop_pct=1.0, interpolation="bilinear")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def threads():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)  # the commands take all cores


def run_folder(path, num_classes=10, router=True):
    """Untrained weights as a run leaves them."""
    torch.manual_seed(0)
    model = timm.create_model("ride_resnet32", num_classes=num_classes, router=router, top_choices_num=3)
    folder = RunFolder(path)
    folder.begin(load_recipe("fashion_lt"), TrainingState())
    folder.export(model.eval(), FASHION, CLASSES[:num_classes])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(1)
    for name, mode, side in (("a.png", "RGB", 28), ("b.png", "L", 60)):
        noise = (255 * torch.rand(side, side, 3)).byte().numpy()
        Image.fromarray(noise).convert(mode).save(folder / name)
    return [str(folder / "a.png"), str(folder / "b.png")]


def output(capsys, *argv) -> str:
    assert exit_code(main, [str(part) for part in argv]) == 0
    captured = capsys.readouterr()
    assert not captured.err or "error:" not in captured.err
    return captured.out


def refusal(capsys, *argv) -> str:
    """The one line of a command that ends in exit code 2."""
    assert exit_code(main, [str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    return captured.err


# flops, models, datasets


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


def test_models_are_listed(capsys, monkeypatch):
    monkeypatch.setattr("ride_timm.cli.models.describe", cache(describe))  # it counts each network's MACs
    rows = json.loads(output(capsys, "models", "--json"))
    names = [row["name"] for row in rows]
    assert {"ride_resnet10", "ride_resnet32", "ride_resnet50", "ride_resnext101"} <= set(names)
    assert not any(name.startswith("test_") for name in names)
    row = rows[names.index("ride_resnet32")]
    assert row["input_size"] == 32 and {"cifar100_lt100", "fashion_lt"} <= set(row["tags"]) and row["params"] > 700_000
    text = output(capsys, "models")
    assert all(name in text for name in names) and "cifar100_lt100" in text


def test_datasets_show(capsys):
    found = json.loads(output(capsys, "datasets", "show", "fashion_lt", "--json"))
    assert found["classes"] == 10 and found["test"] == 1000 and sum(found["class_counts"]) == found["train"]
    assert found["many"] + found["medium"] + found["few"] == 10
    assert "1,000 test images" in output(capsys, "datasets", "show", "fashion_lt")


# evaluate


@pytest.fixture(scope="module")
def evaluated(run):
    """The printed JSON of evaluate, plain and routed: the embedded test images, once."""
    import contextlib
    import io

    found = {}
    for kind, flags in (("plain", []), ("routed", ["--routed"])):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert exit_code(main, ["evaluate", "--model", str(run), "--json", *flags]) == 0
        found[kind] = json.loads(printed.getvalue())
    return found


def test_evaluate(evaluated):
    found = evaluated["plain"]
    assert {"all", "many", "medium", "few", "top5", "macs", "images", "correct"} <= set(found)
    assert "experts_used" not in found
    assert found["images"] == 1000 and found["correct"] == round(10 * found["all"])
    assert 0 <= found["all"] <= 40 and found["top5"] >= found["all"]  # it has not learned anything


def test_evaluate_routed(evaluated):
    found, plain = evaluated["routed"], evaluated["plain"]
    assert len(found["experts_used"]) == 3 and sum(found["experts_used"]) == pytest.approx(1)
    assert found["macs"] < plain["macs"] or found["experts_used"][2] == 1


def test_evaluate_prints_a_table(capsys, run, evaluated):
    text = output(capsys, "evaluate", "--model", f"local-dir:{run}", "--dataset", "fashion_lt")
    assert "ensemble" in text and "few" in text
    assert f"{evaluated['plain']['correct']} of 1000 test images right" in text


def test_evaluate_gives_figures_by_group_and_expert(capsys, run, evaluated, tmp_path):
    found = evaluated["plain"]
    experts = found["experts"]
    assert len(experts["accuracy"]["all"]) == 3 and 0 <= experts["disagreement"]["all"] <= 1
    assert set(found["calibration"]) == {"all", "many", "medium", "few"} and len(found["reliability"]["few"]) == 15
    assert found["worst_class"] == min(found["per_class"]) and len(found["head_to_tail"]) == 10
    routed = evaluated["routed"]
    assert routed["experts_used_by_group"]["all"] == routed["experts_used"] and "experts" not in routed
    argv = (
        "evaluate",
        "--model",
        run,
        "--experts",
        "0,2",
        "--many-shot",
        "500",
        "--few-shot",
        "50",
        "--plots",
        tmp_path,
    )
    chosen = json.loads(output(capsys, *argv, "--json"))
    assert chosen["members"] == [0, 2] and len(chosen["experts"]["accuracy"]["all"]) == 2
    for i, own in ((0, 0), (1, 2)):
        assert chosen["experts"]["accuracy"]["all"][i] == experts["accuracy"]["all"][own]
    assert chosen["macs"] == pytest.approx(found["macs"] * 76.4 / 102.2, rel=1e-2)
    counts, groups = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10], {"many": 2, "medium": 4, "few": 4}
    assert sum(n > 500 for n in counts) == groups["many"] and sum(n < 50 for n in counts) == groups["few"]
    assert chosen["many"] == pytest.approx(sum(chosen["per_class"][:2]) / 2)
    assert chosen["few"] == pytest.approx(sum(chosen["per_class"][6:]) / 4)
    assert {path.name for path in tmp_path.iterdir()} == {"head_to_tail.png", "reliability.png", "experts.png"}
    text = output(capsys, "evaluate", "--model", run, "--experts", "1")
    assert "experts 1" in text and "expert 1" in text and "harmonic mean" in text


# predict


def test_predict(capsys, run, photos):
    lines = output(capsys, "predict", "--model", run, *photos).splitlines()
    assert len(lines) == 2 and all(line.startswith(photo) for line, photo in zip(lines, photos, strict=True))
    assert all(any(f": {name} " in line for name in CLASSES) and line.endswith(" %") for line in lines)


@pytest.mark.parametrize(("threshold", "used"), [("0", 3), ("1", 1)])
def test_predict_routed_in_json(capsys, run, photos, threshold, used):
    argv = ("predict", "--model", run, *photos, "--routed", "--threshold", threshold, "--json")
    rows = json.loads(output(capsys, *argv))
    assert [row["image"] for row in rows] == photos and [row["experts_used"] for row in rows] == [used, used]
    for row in rows:
        assert row["label"] == CLASSES[row["index"]] == row["top"][0]["label"] and len(row["top"]) == 5
        chances = [choice["probability"] for choice in row["top"]]
        assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1.00001
        assert row["probability"] == chances[0]


def test_predict_with_chosen_experts(capsys, run, photos):
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    rows = json.loads(output(capsys, "predict", "--model", run, photos[0], "--experts", "2,0", "--json"))
    with torch.inference_mode():
        logits = model.forward_experts(transform(Image.open(photos[0]).convert("RGB"))[None])[1]
    chances = logits[:, [2, 0]].mean(1).softmax(1)[0]
    assert rows[0]["index"] == chances.argmax() and rows[0]["probability"] == pytest.approx(
        chances.max().item(), abs=1e-5
    )


def test_predictions_are_the_models(capsys, run, photos):
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    rows = json.loads(output(capsys, "predict", "--model", run, *photos, "--json"))
    for row, photo in zip(rows, photos, strict=True):
        with torch.inference_mode():
            chances = model(transform(Image.open(photo).convert("RGB"))[None]).softmax(1)[0]
        assert row["index"] == chances.argmax().item() and "experts_used" not in row
        assert row["probability"] == pytest.approx(chances.max().item(), abs=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--experts", "0,3"), "experts=0,3: expected different numbers from 0 to 2"),
        (("--experts", "1,1"), "expected different numbers"),
        (("--experts", "a"), "expected numbers from 0, such as 0,2"),
        (("--experts", "0", "--routed"), "experts=0: the router chooses where --routed or --curve is given"),
        (("--experts", "0", "--curve", "curve.csv"), "experts=0: the router chooses where --routed or --curve"),
        (("--experts", "0", "--runtime", "onnx"), "and ONNX's graph averages all: leave one of both out"),
        (("--plots", "nowhere"), "plots=nowhere: there is no such folder"),
        (("--many-shot", "10", "--few-shot", "20"), "few_shot=20: expected at most many_shot + 1, 11"),
    ],
)
def test_bad_measures(capsys, run, flags, message):
    assert message in refusal(capsys, "evaluate", "--model", run, *flags)


def test_an_installation_is_checked(capsys, tmp_path):
    """An excerpt in the form of ImageNet-LT: every line's image is there, and the list says what it lacks itself."""
    lines = {"train": 4, "val": 2, "test": 2}
    for split, n in lines.items():
        names = [f"{split}/n01440764/{split}_{i}.JPEG" for i in range(n)]
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text("".join(f"{name} 0\n" for name in names))
        for name in names[1 if split == "val" else 0 :]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
    argv = ["datasets", "check", "imagenet_lt", "--data-dir", str(tmp_path)]
    assert exit_code(main, argv) == 1
    captured = capsys.readouterr()
    assert "has 4 lines, expected 115,846 (115,842 too few)" in captured.out
    assert f"missing: val, line 1: {tmp_path}/val/n01440764/val_0.JPEG" in captured.out
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: imagenet_lt is not as published")
    assert exit_code(main, [*argv, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["val"]["missing"] == [dict(line=1, path=f"{tmp_path}/val/n01440764/val_0.JPEG")]
    message = refusal(capsys, "datasets", "check", "places_lt", "--data-dir", tmp_path)
    assert "no Places_LT_train.txt" in message


def test_unknown_models(capsys, photos):
    assert "ride_resnet77" in refusal(capsys, "flops", "ride_resnet77")
    assert "resnet18" in refusal(capsys, "flops", "resnet18", "--num-experts", "2")
    for command in (("evaluate", "--dataset", "fashion_lt"), ("predict", photos[0])):
        assert "ride_resnet77" in refusal(capsys, command[0], "--model", "ride_resnet77", *command[1:])


@pytest.mark.parametrize("spec", ["nowhere.pth", "nowhere/run", "local-dir:nowhere"])
def test_missing_files(capsys, tmp_path, monkeypatch, photos, spec):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refusal(capsys, "predict", "--model", spec, photos[0])
    assert "nowhere" in refusal(capsys, "evaluate", "--model", spec, "--dataset", "fashion_lt")


def test_not_a_run_folder(capsys, tmp_path, photos):
    assert "no config.json" in refusal(capsys, "predict", "--model", tmp_path, photos[0])
    assert "no config.json" in refusal(capsys, "evaluate", "--model", tmp_path, "--dataset", "fashion_lt")


def test_a_damaged_run_folder(capsys, tmp_path, run, photos):
    for name, content in (("model.safetensors", b"short"), ("config.json", b"{")):
        broken = tmp_path / name
        shutil.copytree(run, broken)
        (broken / name).write_bytes(content)
        assert str(broken) in refusal(capsys, "predict", "--model", broken, photos[0])


def test_a_file_that_is_no_checkpoint(capsys, tmp_path, photos):
    (tmp_path / "model.pth").write_text("hello")
    message = refusal(capsys, "predict", "--model", tmp_path / "model.pth", photos[0])
    assert "not a readable torch checkpoint" in message


def test_a_model_of_other_classes(capsys, tmp_path):
    other = run_folder(tmp_path, num_classes=4, router=False)
    message = refusal(capsys, "evaluate", "--model", other)
    assert "has 4 classes, the data set fashion_lt 10" in message


def test_routed_without_a_router(capsys, tmp_path, photos):
    plain = run_folder(tmp_path, router=False)
    for command in (("evaluate",), ("predict", photos[0])):
        assert "has no router" in refusal(capsys, command[0], "--model", plain, "--routed", *command[1:])


def test_unreadable_images(capsys, tmp_path, run, photos):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "cut.png").write_bytes(Path(photos[0]).read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("not an image")
    for name in ("broken.png", "cut.png", "text.jpg", "missing.png", "."):
        message = refusal(capsys, "predict", "--model", run, photos[0], tmp_path / name)
        assert str(tmp_path / name) in message and "cannot be read" in message


def test_rounded_shares(capsys):
    assert exit_code(main, ["flops", "test_ride_resnet", "--input-size", "32", "--experts-used=33.3,33.3,33.3"]) == 0
    assert "expected, routed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("50,50", "2 shares for 3 experts"),
        ("41,9,49.54", "41,9,49.54 sum to 99.54: expected percentages that sum to 100"),
        ("0.41,0.09,0.5", "0.41,0.09,0.5 sum to 1: expected percentages that sum to 100"),
        ("120,-20,0", "expected percentages that sum to 100, none below 0"),
        ("a,b,c", "expected percentages"),
        ("50,,50", "expected percentages"),
        ("nan,nan,nan", "sum to nan: expected percentages"),
    ],
)
def test_bad_shares(capsys, shares, message):
    assert message in refusal(capsys, "flops", "test_ride_resnet", "--input-size", 32, f"--experts-used={shares}")


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


def test_unknown_data(capsys, tmp_path, run):
    missing = tmp_path / "nowhere"
    assert str(missing) in refusal(capsys, "evaluate", "--model", run, "--dataset", missing)
    assert str(missing) in refusal(capsys, "datasets", "show", missing)
    assert "no-such-data" in refusal(capsys, "datasets", "check", "no-such-data")
    assert "no-such-recipe" in refusal(capsys, "evaluate", "--model", run, "--recipe", "no-such-recipe")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(capsys, "datasets", "show", tmp_path / "empty")


def test_no_data_named(capsys, tmp_path, run):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, alone / name)
    assert "--dataset or --recipe" in refusal(capsys, "evaluate", "--model", alone)


@pytest.mark.parametrize("argv", [(), ("train",), ("predict", "--model", "x"), ("evaluate",)])
def test_incomplete_commands(capsys, argv):
    refusal(capsys, *argv)


def test_a_place_where_nothing_is_is_named(capsys, photos, tmp_path):
    missing = str(tmp_path / "mien")
    for argv in (("predict", photos[0]), ("evaluate",), ("export", "--output", tmp_path / "new")):
        told = refusal(capsys, argv[0], "--model", missing, *argv[1:])
        assert f"model '{missing}': no such folder or file (for a Hub repository write hf-hub:owner/name)" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--threshold", "0.9"), "give --routed as well, or leave --threshold out"),
        (("--routed", "--threshold", "50"), "expected a probability, 0 to 1"),
        (("--routed", "--threshold", "nan"), "expected a probability, 0 to 1"),
    ],
)
def test_a_threshold_needs_a_router_and_a_range(capsys, run, photos, flags, message):
    assert message in refusal(capsys, "predict", "--model", run, photos[0], *flags)
    if "--routed" in flags:
        exported = ("export", "--model", run, "--output", run / "new", "--routed", "masked", *flags[1:])
        assert message in refusal(capsys, *exported)
    if "nan" not in flags:
        told = refusal(capsys, "evaluate", "--model", run, "--dataset", "fashion_lt", *flags)
        assert message in told or "threshold='50'" in told


def test_images_that_a_network_does_not_take(capsys, photos, tmp_path):
    for name, model in (
        ("grey", timm.create_model("test_ride_resnet", num_classes=10, in_chans=1)),
        ("patches", timm.create_model("ride", backbone="test_vit", num_classes=10, num_experts=2)),
    ):
        RunFolder(tmp_path / name).save(TrainingState())
        RunFolder(tmp_path / name).export(model, dict(input_size=(model.in_chans, 160, 160)), CLASSES)
    grey, patches = tmp_path / "grey", tmp_path / "patches"
    found = json.loads(output(capsys, "predict", "--model", grey, *photos, "--json"))
    assert [row["image"] for row in found] == photos
    data = ("--dataset", "fashion_lt")
    assert "28 x 28 pixels in 3 channels" in refusal(capsys, "evaluate", "--model", grey, *data)
    assert "28 x 28 pixels in 3 channels" in refusal(capsys, "evaluate", "--model", patches, *data)
    size = ("--input-size", "100")
    assert "100 x 100 pixels" in refusal(capsys, "flops", "ride", "--backbone", "test_vit", *size)
    told = refusal(capsys, "export", "--model", patches, "--output", tmp_path / "onnx", *size)
    assert "100 x 100 pixels" in told and not (tmp_path / "onnx").exists()


def test_an_image_too_large_to_be_meant_is_named(capsys, run, photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert f"image {photos[1]} cannot be read" in refusal(capsys, "predict", "--model", run, photos[1])


def test_a_check_reads_validation_images_too_and_no_flag_is_without_effect(capsys, colours, tmp_path):
    shutil.copytree(colours, tmp_path / "own")
    shutil.copytree(colours / "test", tmp_path / "own" / "val")
    check = ("datasets", "check", tmp_path / "own", "--use-val", "--json")
    assert json.loads(output(capsys, *check))["unreadable"] == []
    broken = sorted((tmp_path / "own" / "val").rglob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:60])
    assert exit_code(main, [str(part) for part in check]) == 1
    assert len(json.loads(capsys.readouterr().out)["unreadable"]) == 1
    assert "add --imb-type exp or step" in refusal(capsys, "datasets", "show", colours, "--imb-factor", "0.5")
    streamed = refusal(capsys, "datasets", "check", colours, "--streaming")
    assert "leave --streaming out" in streamed

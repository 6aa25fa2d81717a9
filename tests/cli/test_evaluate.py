import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from commands import CLASSES, output, refusal, run_folder
from PIL import Image

from ride_timm.cli import evaluate
from ride_timm.cli.evaluate import _DATA_KEYS
from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.data.load import load_longtail
from ride_timm.data.loaders import make_loader
from ride_timm.evaluation.macs import count_macs
from ride_timm.training.recipe import Recipe


@pytest.fixture(scope="module")
def evaluated(run):
    """JSON of evaluate on the embedded test images, of the ensemble and routed."""
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


def test_a_threshold_decides_how_many_experts_run(capsys, run):
    for threshold, used in (("0", 1.0), ("1", 0.0)):
        found = json.loads(output(capsys, "evaluate", "--model", run, "--routed", "--threshold", threshold, "--json"))
        assert found["threshold"] == float(threshold) and found["experts_used"][2] == used


def test_evaluate_prints_a_table(capsys, run, evaluated):
    text = output(capsys, "evaluate", "--model", f"local-dir:{run}", "--dataset", "fashion_lt")
    assert "ensemble" in text and "few" in text
    assert f"{evaluated['plain']['correct']} of 1000 test images correct" in text


def test_metrics_by_group_and_expert(capsys, run, evaluated, tmp_path):
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
        "1,3",
        "--many-shot",
        "500",
        "--few-shot",
        "50",
        "--plots",
        tmp_path / "new" / "plots",
    )
    chosen = json.loads(output(capsys, *argv, "--json"))
    assert chosen["members"] == [1, 3] and len(chosen["experts"]["accuracy"]["all"]) == 2
    for i, own in ((0, 0), (1, 2)):
        assert chosen["experts"]["accuracy"]["all"][i] == experts["accuracy"]["all"][own]
    costs = count_macs(timm.create_model("test_ride_resnet", num_classes=10), (3, 28, 28))
    assert chosen["macs"] == pytest.approx(costs.trunk + costs.experts[0] + costs.experts[2])
    counts, groups = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10], {"many": 2, "medium": 4, "few": 4}
    assert sum(n > 500 for n in counts) == groups["many"] and sum(n < 50 for n in counts) == groups["few"]
    assert chosen["many"] == pytest.approx(sum(chosen["per_class"][:2]) / 2)
    assert chosen["few"] == pytest.approx(sum(chosen["per_class"][6:]) / 4)
    assert {path.name for path in argv[-1].iterdir()} == {"long_tail.png", "reliability.png", "experts.png"}
    text = output(capsys, "evaluate", "--model", run, "--experts", "2")
    assert "experts 2" in text and "expert 2" in text and "expert 1" not in text and "harmonic mean" in text


def test_confusions(capsys, run, evaluated, tmp_path):
    text = output(capsys, "evaluate", "--model", run, "--confusions", folder := tmp_path / "new")
    with (folder / "confusion_matrix.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    matrix = [list(map(int, row[1:])) for row in rows]
    found = evaluated["plain"]
    assert header[1:] == [row[0] for row in rows] == found["class_names"]
    assert [row[c] for c, row in enumerate(matrix)] == pytest.approx(found["per_class"])  # of 100 images each
    with (folder / "classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes] == found["class_names"] and {row["test images"] for row in classes} == {
        "100"
    }
    for name in ("precision", "recall", "f1"):
        values = [float(row[name]) if row[name] else None for row in classes]
        assert values == pytest.approx(found[name]["per_class"], nan_ok=True)
    largest = found["confusions"][0]
    names = [found["class_names"][largest[key]] for key in ("true", "predicted")]
    assert matrix[largest["true"]][largest["predicted"]] == largest["images"] == largest["percent"]
    assert f"{names[0]} → {names[1]} " in text and "precision  recall" in text
    assert (folder / "confusion_matrix.png").is_file() and len(found["f1"]["per_class"]) == 10


def test_a_test_prior_moves_the_predictions(capsys, run, evaluated, tmp_path, monkeypatch):
    argv = ("evaluate", "--model", run, "--model-prior", "uniform", "--test-prior")
    plain = evaluated["plain"]
    same = json.loads(output(capsys, *argv, "uniform", "--json"))
    assert all(same[key] == plain[key] for key in plain)
    one = tmp_path / "prior.txt"
    one.write_text("\n".join(str(int(c == 6)) for c in range(10)))
    found = json.loads(output(capsys, *argv, one, "--json"))  # shirts alone
    assert found["per_class"] == [100 * (c == 6) for c in range(10)] and found["correct"] == 100
    assert found["test_prior"] == [float(c == 6) for c in range(10)]
    assert found["without_test_prior"] == {key: plain[key] for key in ("all", "many", "medium", "few", "top5")}
    drawn = {}
    monkeypatch.setattr(evaluate, "plot_metrics", lambda folder, rows, *_: drawn.update(rows))
    output(capsys, *argv, one, "--plots", tmp_path / "plots")
    bare, moved = drawn.values()
    assert bare["per_class"] == plain["per_class"] != moved["per_class"] and bare["calibration"] == plain["calibration"]
    text = output(capsys, "evaluate", "--model", run, "--routed", "--test-prior", "estimate")
    assert "routed, prior estimate" in text


def test_shifted_test_sets_are_one_table(capsys, run, evaluated):
    found = json.loads(output(capsys, "evaluate", "--model", run, "--shifted", "--json"))
    assert found["all"] == evaluated["plain"]["all"] and "test_prior" not in found
    assert [row["ratio"] for row in found["shifted"]] == [50, 25, 10, 5, 2, 1, 2, 5, 10, 25, 50]
    uniform = found["shifted"][5]
    assert uniform["images"] == 1000 and uniform["accuracy"] == found["all"]
    text = output(capsys, "evaluate", "--model", run, "--shifted", "--experts", "1")
    assert "forward 50" in text and "estimated prior" in text and "no sets of ratio" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--model-prior", "train"),
            "model-prior is where --test-prior moves the logits from: pass both, or",
        ),
        (("--test-prior", "estimate", "--curve", "c.csv"), "the curve is of the bare logits: leave --test-prior or"),
        (("--five-crop", "--routed"), "five-crop averages all experts on every crop: leave --routed and --curve out"),
        (("--five-crop",), "the test transform of augmentation 'fashion' crops nothing at 28 pixels"),
        (("--test-prior", "absent.csv"), "absent.csv cannot be read (No such file or directory)"),
        (("--experts", "1,4"), "experts=1,4: expected different numbers from 1 to 3"),
        (("--experts", "0,1"), "experts=0,1: expected different numbers from 1 to 3"),
        (("--experts", "1,1"), "expected different numbers"),
        (("--experts", "a"), "expected numbers from 1, such as 1,3"),
        (("--experts", "1", "--routed"), "experts=1: the router chooses the experts; leave --experts out"),
        (("--experts", "1", "--curve", "curve.csv"), "experts=1: the router chooses the experts"),
        (("--experts", "1", "--runtime", "onnx"), "experts=1: the ONNX graph averages all experts"),
        (("--plots", f"{__file__}/x"), "test_evaluate.py is a file, expected a folder"),
        (("--confusions", __file__), "test_evaluate.py is a file, expected a folder"),
        (("--many-shot", "10", "--few-shot", "20"), "few_shot=20: expected at most many_shot + 1, 11"),
    ],
)
def test_bad_flags(capsys, run, flags, message):
    assert message in refusal(capsys, "evaluate", "--model", run, *flags)


def test_held_out_images_are_unseen_only_where_all_that_chooses_them_agrees():
    without_effect = {"test_split", "use_val", "streaming", "shuffle_buffer"}
    assert set(_DATA_KEYS) == set(Recipe().data_args) - without_effect - {"seed"} | {"split_seed"}


def test_a_model_of_other_classes(capsys, tmp_path):
    other = run_folder(tmp_path, num_classes=4, router=False)
    message = refusal(capsys, "evaluate", "--model", other)
    assert "has 4 classes, the data set fashion_lt 10" in message


def test_no_data_named(capsys, tmp_path, run):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, alone / name)
    assert "--dataset or --recipe" in refusal(capsys, "evaluate", "--model", alone)


def test_images_become_inputs_as_for_predict_and_classes_go_by_name(capsys, tmp_path, run):
    """Of a model without a recipe; the folders are in another order than its classes."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / name, alone / name)
    images = load_longtail("fashion_lt").test
    for i in range(0, 1000, 17):
        image, label = images[i]
        for split in ("train", "test"):
            folder = tmp_path / "own" / split / CLASSES[label].replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    found = json.loads(output(capsys, "evaluate", "--model", alone, "--dataset", tmp_path / "own", "--json"))
    rows = json.loads(output(capsys, "predict", "--model", alone, tmp_path / "own" / "test", "--json"))
    assert found["class_names"] == [name.replace("/", "-") for name in CLASSES]
    assert found["images"] == len(rows) == 59
    right = [row["label"].replace("/", "-") == Path(row["image"]).parent.name for row in rows]
    assert 0 < found["correct"] == sum(right) < 59
    known = json.loads(output(capsys, "evaluate", "--model", run, "--json"))
    assert found["macs"] == known["macs"]


def test_five_crops_are_averaged_at_five_times_the_macs(capsys, run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for c in range(10):
            folder = tmp_path / split / f"class{c}"
            folder.mkdir(parents=True)
            noise = (255 * torch.rand(60, 48, 3, generator=generator)).byte().numpy()
            Image.fromarray(noise).save(folder / "a.png")
    flags = (
        "--dataset",
        tmp_path,
        "--imb-type",
        "none",
        "--augment",
        "imagenet",
        "--input-size",
        "28",
        "--workers",
        "0",
    )
    argv = ("evaluate", "--model", run, *flags, "--five-crop")
    found = json.loads(output(capsys, *argv, "--json"))
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    data = load_longtail(str(tmp_path), imb_type="none")
    loader = make_loader(data.test, "imagenet", train=False, batch_size=10, seed=0, input_size=28, five_crops=True)
    with torch.inference_mode():
        right = sum((model(x).unflatten(0, (5, -1)).mean(0).argmax(1) == y).sum().item() for x, y in loader)
    assert found["correct"] == right and found["crops"] == 5 and found["images"] == 10
    plain = json.loads(output(capsys, *argv[:-1], "--json"))
    assert found["macs"] == 5 * plain["macs"] and "crops" not in plain
    assert "ensemble, five crops" in output(capsys, *argv)

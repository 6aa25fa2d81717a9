import json
import shutil

from commands import output, refusal

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.data.load import load_longtail


def test_datasets_show(capsys):
    found = json.loads(output(capsys, "datasets", "show", "fashion_lt", "--json"))
    assert found["classes"] == 10 and found["test"] == 1000 and sum(found["class_counts"]) == found["train"]
    assert found["many"] + found["medium"] + found["few"] == 10
    assert "1,000 test images" in output(capsys, "datasets", "show", "fashion_lt")


def test_an_installation_is_checked(capsys, tmp_path):
    """An excerpt in the form of ImageNet-LT: every listed image exists, and the list reports what it lacks itself."""
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


def test_an_installation_whose_images_are_decoded_is_one_json_document(capsys, colours, monkeypatch):
    published = dict(problems=[], root="/data", splits={})
    monkeypatch.setattr("ride_timm.cli.datasets.check_installation", lambda *_: published)
    data = load_longtail(str(colours))
    monkeypatch.setattr("ride_timm.cli.datasets.load_longtail", lambda **_: data)
    found = json.loads(output(capsys, "datasets", "check", "imagenet_lt", "--data-dir", "x", "--decode", "--json"))
    assert found["root"] == "/data" and found["unreadable"] == [] and found["classes"] == 3


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

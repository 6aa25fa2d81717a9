"""Tables of predictions, read back."""

import csv
import json

import datasets
import pytest

from ride_timm import InputError, RunError
from ride_timm.inference import writers
from ride_timm.inference.writers import Columns, check_output, write_rows

TOP = [dict(label="a, b", index=0, probability=0.75), dict(label="c", index=2, probability=0.25)]
ROWS = [
    dict(image="broken", error="OSError: no"),
    dict(image="ä\n.png", **TOP[0], top=TOP, experts_used=2, features=[0.5, -1.0]),
]


def test_csv_has_a_column_for_every_class(tmp_path):
    write_rows(ROWS, tmp_path / "t.csv", Columns(top_k=2, routed=True))
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        broken, row = csv.DictReader(file)
    assert broken["error"] == "OSError: no" and broken["label"] == broken["experts_used"] == ""
    assert row == dict(
        image="ä\n.png", label="a, b", index="0", probability="0.75", label_2="c", index_2="2", probability_2="0.25",
        experts_used="2", error="",
    )  # fmt: skip


def test_json_lines_are_the_rows(tmp_path):
    write_rows(ROWS, tmp_path / "t.jsonl", Columns(2))
    assert [json.loads(line) for line in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()] == ROWS


def test_parquet_is_read_by_datasets_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_ROW_GROUP", 3)
    write_rows(ROWS * 4, tmp_path / "T.PARQUET", Columns(2, routed=True, features=True))
    read = datasets.Dataset.from_parquet(str(tmp_path / "T.PARQUET"), cache_dir=str(tmp_path / "cache"))
    assert len(read) == 8 and read[6] == dict.fromkeys(read.column_names) | ROWS[0]
    assert read[7] == ROWS[1] | dict(error=None)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_that_fails_leaves_nothing(tmp_path, suffix):
    def rows(error):
        yield from ROWS
        raise error

    (tmp_path / f"t{suffix}").write_text("old")
    with pytest.raises(RunError, match="could not be written; an older file of this name is unchanged"):
        write_rows(rows(OSError("disk full")), tmp_path / f"t{suffix}", Columns(2))
    with pytest.raises(RuntimeError, match="of the network"):
        write_rows(rows(RuntimeError("of the network")), tmp_path / f"t{suffix}", Columns(2))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_is_no_output(tmp_path):
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path / "t.csv", features=False)

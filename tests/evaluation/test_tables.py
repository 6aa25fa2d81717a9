"""Text and Markdown tables."""

from ride_timm.evaluation.tables import (
    GROUPS,
    groups_table,
    markdown_table,
    metrics_table,
    millions,
    number,
    percentages,
)


def test_table_aligns_and_dashes_what_is_missing():
    rows = {
        "ensemble": {"all": 48.6, "many": 67.0, "medium": 49.9, "few": None, "top5": 100.0, "macs": 102.2e6},
        "routed": {"all": 48.04, "many": 66.9, "top5": 78.1, "macs": 6.13e9, "experts_used": [0.4099, 0.0947, 0.4954]},
    }
    assert metrics_table(rows).splitlines() == [
        "            all   many  medium  few   top-5    MMACs         experts used",
        "--------  -----  -----  ------  ---  ------  -------  -------------------",
        "ensemble  48.60  67.00   49.90    –  100.00    102.2                    –",
        "routed    48.04  66.90       –    –   78.10  6,130.0  41.0 / 9.5 / 49.5 %",
    ]


def test_numbers_and_their_units():
    assert number(48.6) == "48.60" and number(0.12345, 3) == "0.123" and number(None) == "–"
    assert millions(78_583_101) == "78.6" and millions(6.1314e9) == "6,131.4" and millions(None) == "–"
    assert percentages([0.4099, 0.0947, 0.4954]) == "41.0 / 9.5 / 49.5 %"
    assert percentages(None) == percentages([]) == "–"


def test_a_markdown_table():
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def of_groups(value):
    return dict.fromkeys(GROUPS, value)


def metrics(**more):
    calibration = dict(confidence=60.0, ece=12.345)
    return dict(
        **of_groups(50.0), class_means=of_groups(40.0), calibration=of_groups(calibration), worst_class=1.0,
        harmonic_mean=None, **more
    )  # fmt: skip


def test_groups_of_an_ensemble_with_experts_numbered_from_1():
    experts = dict(accuracy=of_groups([30.0, None]), disagreement=of_groups(0.5), diversity=of_groups(0.1234))
    lines = groups_table(metrics(experts=experts)).splitlines()
    assert "expert 1  expert 2  disagreement  diversity" in lines[0]
    assert [line.split() for line in lines[2:6]] == [
        [group, "50.00", "40.00", "60.00", "12.35", "30.00", "–", "50.00", "0.123"] for group in GROUPS
    ]
    assert lines[6] == "worst class 1.00, harmonic mean of the classes –"
    chosen = groups_table(metrics(experts=experts, members=[1, 3]))
    assert "expert 1  expert 3" in chosen


def test_groups_of_a_router():
    lines = groups_table(metrics(experts_used_by_group=of_groups([0.5, 0.5]) | dict(few=None))).splitlines()
    assert lines[0].endswith("experts used") and lines[4].endswith("50.0 / 50.0 %") and lines[5].endswith("–")

"""The demo's HTML: its numbers, what it leaves out, and that it escapes."""

import re
from dataclasses import replace

import pytest

from ride_timm.inference.demo.markup import _short, classes_html, decision_html, error_html, setting_html
from ride_timm.inference.demo.opinions import Candidate, Opinions, Routed, load_demo

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def demo(run):
    demo = load_demo(str(run), "cpu")
    macs = replace(demo.macs, trunk=1e6, experts=(1e6, 1e6, 1e6), gates=(0.0, 0.0))
    return replace(demo, macs=macs)


def opinions(used=2, label="cat", counts=True):
    best = Candidate("cat", 0.8, 1234 if counts else None)
    others = (Candidate(label, 0.7, 1234 if counts else None), Candidate("dog", 1e-6, 3 if counts else None))
    routed = used and Routed(best, used, 1e6 * (1 + used), 1 - (1 + used) / 4)
    return Opinions(others, (others[:1], (best,), others[1:]), routed or None)


def text(html):
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("&nbsp;", " ").replace("&lt;", "<").split())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (opinions(1), ["cat · 80.0 %", "1 of 3 experts : 2.0 MMACs for this image, 50 % less than all 3 (4.0).",
                       "All 3 together predict the same."]),
        (opinions(2, "dog"), ["2 of 3 experts : 3.0 MMACs", "25 % less", "together predict dog (70.0 %)."]),
        (opinions(3), ["The router used all 3 experts : 4.0 MMACs for this image."]),
        (opinions(0, "dog"), ["dog · 70.0 %"]),
    ],
)  # fmt: skip
def test_the_decision(demo, given, expected):
    shown = text(decision_html(demo, given))
    assert all(part in shown for part in expected), shown
    assert ("router" in shown) == (given.routed is not None)
    assert ("together" in shown) == (given.routed is not None and given.routed.experts_used < 3)


def test_the_classes(demo):
    shown = text(classes_html(demo, opinions(2)))
    assert "cat 70.0 % 1,234" in shown and "dog < 0.1 % 3" in shown and "training images" in shown
    assert re.findall(r"Expert (\d) (used|skipped)", shown) == [("1", "used"), ("2", "used"), ("3", "skipped")]
    without = text(classes_html(demo, opinions(0, counts=False)))
    assert "training" not in without and "skipped" not in without and "used" not in without


def test_the_settings(demo):
    shown = text(setting_html(demo, demo.settings[2]))
    for part in ("0.25 threshold", "45.5 % accuracy (all experts: 46.0 %)", "1.2 MMACs per image (all experts: 4.0)",
                 "70 % saved", "many 55.0 %, medium 35.0 %.", "from 1 to 3: 50.0 / 25.0 / 25.0 %."):  # fmt: skip
        assert part in shown, shown
    assert "few" not in shown
    dear = demo.settings[2] | dict(macs=4.1e6)
    assert "nothing saved" in text(setting_html(demo, dear))
    bare = dict.fromkeys(demo.settings[2]) | dict(threshold=0.5)
    assert text(setting_html(demo, bare)) == "0.5 threshold Its accuracy and cost were not measured."


def test_text_of_models_and_files_is_escaped(demo):
    evil = opinions(2, EVIL)
    pages = [decision_html(demo, evil), classes_html(demo, evil), error_html(EVIL)]
    assert all("<script" not in page and "&lt;script" in page for page in pages)


@pytest.mark.parametrize(
    ("threshold", "shown"),
    [(1.0, "1"), (0.0, "0"), (0.5, "0.5"), (0.9984, "0.998"), (0.999973, "0.99997"), (6.8e-9, "7e-09"), (0.1, "0.1")],
)
def test_thresholds_near_0_and_1_are_told_from_them(threshold, shown):
    assert _short(threshold) == shown

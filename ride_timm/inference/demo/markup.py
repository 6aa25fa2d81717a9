"""HTML of the demo's results; text from models is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ...evaluation.routing_curve import Point
from ...evaluation.tables import GROUPS, millions, number, percentages
from .opinions import Candidate, Demo, Opinions

CSS = """
h1 { overflow-wrap: anywhere; font-size: clamp(1.3rem, 6vw, 1.8rem) !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
#setting .tab-like-container, #setting .min_value, #setting .max_value { display: none; }
#setting, #about { background: var(--block-background-fill); }
#decision .html-container, #classes .html-container { padding: 0; }
.ride p { margin: .25rem 0; }
.ride h3 { margin: .25rem 0 .5rem; font-size: 1rem; }
.ride table + h3 { margin-top: 1.25rem; }
.ride .lead { font-size: 1.35rem; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.ride .note { opacity: .75; font-size: .875rem; }
.ride .box { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .75rem 1rem; }
.ride .error { border-color: #dc2626; }
.ride .skipped { opacity: .65; border-style: dashed; }
.ride .cards, .ride .stats { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.ride .card-head { display: flex; justify-content: space-between; gap: .5rem; }
.ride .stats { grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); margin-bottom: .5rem; }
.ride .stats b { display: block; font-size: 1.15rem; }
.ride table { width: 100%; table-layout: fixed; border-collapse: collapse; margin: 0; border: 0 !important; }
.ride tr { border: 0 !important; }
.ride tr + tr { border-top: 1px solid var(--border-color-primary) !important; }
.ride th { font-weight: 400 !important; font-size: .8rem; opacity: .75; }
.ride th, .ride td { border: 0 !important; padding: .3rem .25rem !important; overflow-wrap: anywhere; }
.ride .count { text-align: right !important; width: 5rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.ride .cards .box { padding: .75rem; font-size: .9rem; }
.ride .cards .count { width: 4.25rem; }
.ride .bar { background: var(--border-color-primary); border-radius: .25rem; height: .5rem; overflow: hidden; }
.ride .bar span { display: block; height: 100%; background: var(--color-accent); }
"""  # hidden: the slider's own numbers, which count settings; important: over gradio's rules for tables


def decision_html(demo: Demo, opinions: Opinions) -> str:
    """The prediction, the experts that the router used, and what that saved."""
    best, num_experts = opinions.ensemble[0], demo.model.num_experts
    lines = []
    if (routed := opinions.routed) is not None:
        best, top = routed.best, opinions.ensemble[0]
        cost = f"{millions(routed.macs)} MMACs for this image"
        if routed.experts_used == num_experts:
            lines.append(f"The router used <b>all {num_experts} experts</b>: {cost}.")
        else:
            saved = f"{100 * routed.saved:.0f} % less than all {num_experts} ({millions(demo.macs.ensemble)})"
            lines.append(f"The router used <b>{routed.experts_used} of {num_experts} experts</b>: {cost}, {saved}.")
            together = "the same" if best.label == top.label else f"{escape(top.label)} ({_percent(top.probability)})"
            lines.append(f"All {num_experts} together predict {together}.")
    lead = f'<p class="lead">{escape(best.label)} · {_percent(best.probability)}</p>'
    return _ride(f'<div class="box">{lead}{"".join(f"<p>{line}</p>" for line in lines)}</div>')


def classes_html(demo: Demo, opinions: Opinions) -> str:
    """The classes of the ensemble and those of each expert, with their training images."""
    num_experts = demo.model.num_experts
    if num_experts == 1:
        return _ride(_table(opinions.ensemble, bars=True))
    used = opinions.routed.experts_used if opinions.routed else num_experts
    cards = (_card(i, own, i < used, opinions.routed is not None) for i, own in enumerate(opinions.experts))
    return _ride(
        f"<h3>All {num_experts} experts together</h3>{_table(opinions.ensemble, bars=True)}"
        f'<h3>Each expert on its own</h3><div class="cards">{"".join(cards)}</div>'
    )


def setting_html(demo: Demo, setting: Point) -> str:
    """Accuracy and cost at a threshold, measured on the test set."""
    stats, notes = [(_short(setting["threshold"]), "threshold")], ["Its accuracy and cost were not measured."]
    if setting["all"] is not None and setting["macs"] is not None:
        saved = round(100 * (1 - setting["macs"] / demo.macs.ensemble))
        stats += [
            (f"{number(setting['all'], 1)} %", f"accuracy (all experts: {number(demo.accuracy, 1)} %)"),
            (millions(setting["macs"]), f"MMACs per image (all experts: {millions(demo.macs.ensemble)})"),
            (f"{saved} %" if saved > 0 else "nothing", "saved"),
        ]
        notes = ["Measured on the test set. MMACs: millions of multiply-accumulates."]
    if groups := [f"{name} {number(setting[name], 1)} %" for name in GROUPS[1:] if setting[name] is not None]:
        notes.append(f"Accuracy by training images of a class: {', '.join(groups)}.")
    if used := setting["experts_used"]:
        notes.append(f"Images by experts used, from 1 to {len(used)}: {percentages(used)}.")
    shown = "".join(f"<div><b>{value}</b>{name}</div>" for value, name in stats)
    return _ride(f'<div class="stats">{shown}</div><p class="note">{"<br>".join(notes)}</p>')


def error_html(message: str) -> str:
    return _ride(f'<div class="box error" role="alert"><p>{escape(message)}</p></div>')


def hint_html(message: str) -> str:
    return _ride(f'<div class="box"><p>{escape(message)}</p></div>')


def _ride(content: str) -> str:
    return f'<div class="ride">{content.replace(" %", "&nbsp;%")}</div>'


def _table(candidates: Sequence[Candidate], bars: bool) -> str:
    counted = candidates[0].train_images is not None
    head = "<th>class</th><th>probability</th>" + ('<th class="count">training<br>images</th>' if counted else "")
    rows = [head] if bars else []
    for candidate in candidates:
        shown, width = _percent(candidate.probability), f"{100 * candidate.probability:.1f}%"
        bar = f'{shown}<div class="bar"><span style="width: {width}"></span></div>'
        label = escape(candidate.label).replace("_", "_<wbr>")
        cells = f"<td>{label}</td>"
        cells += f"<td>{bar}</td>" if bars else f'<td class="count">{shown}</td>'
        rows.append(cells + (f'<td class="count">{candidate.train_images:,}</td>' if counted else ""))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _card(index: int, own: Sequence[Candidate], used: bool, routed: bool) -> str:
    state = "used" if used else "skipped"
    note = f'<span class="note">{state}</span>' if routed else ""
    head = f'<div class="card-head"><b>Expert {index + 1}</b>{note}</div>'
    return f'<div class="box {state}">{head}{_table(own, bars=False)}</div>'


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "&lt; 0.1 %"


def _short(threshold: float) -> str:
    """0.5, 0.998, 0.99997 or 7e-10: enough digits to tell it from 0 and 1."""
    if 0 < threshold < 0.0005:
        return f"{threshold:.0e}"
    digits = 3
    while threshold < 1 and digits < 12 and round(threshold, digits) == 1:
        digits += 1
    return f"{threshold:.{digits}f}".rstrip("0").rstrip(".")

"""The table of all tags: our name, where the original lies, its state.

python hub/tags.py

renders it into hub/README.md. A tag is published (on the Hub), staged (a folder here whose weights stand beside its
cfg), convertible (a checkpoint of the authors' zoo), or trainable (a recipe or the authors' configuration makes it).
"""

from __future__ import annotations

import sys
from typing import Any

import timm
from staged import CONFIG, HERE, fill_file, read_table
from zoo import DOWNLOAD, read_zoo

from ride_timm.cli.process import exit_code
from ride_timm.models.release import NAMESPACE
from ride_timm.training.arguments import Parser

PAGE = HERE / "README.md"
BEGIN, END = "<!-- tags: rendered by hub/tags.py -->", "<!-- tags: end -->"


def rows() -> list[dict[str, Any]]:
    """One row a tag that may have weights, by network; those called untrained have none to be had."""
    table, zoo, found = read_table(), read_zoo(), []
    for name in timm.list_models("ride*"):
        for tag in sorted(timm.models.get_arch_pretrained_cfgs(name)):
            if tag.endswith(".untrained"):
                continue
            release, original = table.get(tag, {}), zoo["checkpoints"].get(tag)
            args = release.get("model_args", {})
            state = "convertible" if original else "trainable"
            if release.get("sha256") and (HERE / tag / CONFIG).is_file():
                state = "staged"
            if release.get("published"):
                state = "published"
            found.append(
                dict(
                    tag=tag,
                    experts=args.get("num_experts", 3),
                    router=bool(args.get("router")),
                    original=DOWNLOAD.format(original["file"]) if original else None,
                    state=state,
                )
            )
    return found


def render_table() -> str:
    lines = ["| our name | experts | router | original | state |", "|---|---|---|---|---|"]
    for row in rows():
        original = f"[authors' zoo]({row['original']})" if row["original"] else "–"
        state = f"[published](https://huggingface.co/{NAMESPACE}/{row['tag']})"
        state = {"published": state, "staged": f"[staged]({row['tag']})"}.get(row["state"], row["state"])
        lines.append(
            f"| `{row['tag']}` | {row['experts']} | {'yes' if row['router'] else 'no'} | {original} | {state} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None) -> None:
    Parser(description=__doc__, allow_abbrev=False).parse_args(argv)
    fill_file(PAGE, BEGIN, END, render_table())


if __name__ == "__main__":
    sys.exit(exit_code(main, None))

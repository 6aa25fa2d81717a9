"""The page of the demo, made with gradio."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from ...data.datasets import KNOWN
from ...errors import InputError
from .drawings import write_drawings
from .examples import write_examples
from .markup import CSS, classes_html, decision_html, error_html, hint_html, setting_html
from .opinions import Demo

LARGEST = "20mb"  # of an uploaded file


def build_page(demo: Demo) -> gr.Blocks:
    """The page; its endpoint /predict: (image, setting from 1) -> HTML of decision, setting and classes."""

    def predict(image: dict[str, Any] | None, setting: float | None = None) -> tuple[str, str, str]:
        chosen = demo.default + 1 if setting is None else round(setting)
        point = demo.settings[min(max(chosen, 1), len(demo.settings)) - 1] if demo.settings else None
        about = setting_html(demo, point) if point else ""
        if image is None:
            return hint_html("Drop an image to see what it is."), about, ""
        try:
            opinions = demo.predict(image["path"], point["threshold"] if point else 0.5)
        except InputError as error:
            return error_html(str(error)), about, ""
        return decision_html(demo, opinions), about, classes_html(demo, opinions)

    with gr.Blocks(title=demo.name, analytics_enabled=False) as page:
        gr.Markdown(_introduction(demo))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=280, elem_id="image")
                with tempfile.TemporaryDirectory() as folder:
                    made = write_examples(demo.dataset, Path(folder))
                    if examples := made or demo.examples or write_drawings(demo.labels, Path(folder)):
                        gr.Examples([[str(path)] for path in examples], image, label="Examples")  # copied
            with gr.Column(scale=3, min_width=300):
                decision = gr.HTML(elem_id="decision", padding=False)
                with gr.Group(visible=bool(demo.settings)):
                    setting = gr.Slider(
                        1,
                        max(len(demo.settings), 2),
                        demo.default + 1,
                        step=1,
                        label="Threshold of the router",
                        info="left: fewer experts, cheaper; right: more experts, more accurate",
                        elem_id="setting",
                    )
                    about = gr.HTML(elem_id="about", padding=True)
                classes = gr.HTML(elem_id="classes", padding=False)
        gr.on(
            [page.load, image.change, setting.change],
            predict,
            [image, setting],
            [decision, about, classes],
            api_name="predict",
            preprocess=False,  # the file as it was uploaded: it is decoded as the command predict does, or refused
            show_progress="hidden",
            trigger_mode="always_last",
        )
    return page


def launch(demo: Demo, port: int | None = None, **options: Any) -> tuple[gr.Blocks, str]:
    """Start the server and return the page with its URL; options as of gradio's `launch`.

    InputError where the port is taken.
    """
    page = build_page(demo)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # not fetched
    theme.set(block_info_text_color="*neutral_500", body_text_color_subdued="*neutral_500")
    try:
        _, url, _ = page.launch(
            server_port=port,
            theme=theme,
            css=CSS,
            max_file_size=LARGEST,
            **options,
        )
    except OSError as error:
        raise InputError(f"port={port}: no free port ({error}): choose another --port.") from error
    return page, url


def _introduction(demo: Demo) -> str:
    known, num_experts = KNOWN.get(demo.dataset or ""), demo.model.num_experts
    lines = [f"{len(demo.labels)} classes of {known.title}." if known else f"{len(demo.labels)} classes."]
    if num_experts > 1:
        lines.append(f"{num_experts} experts share the first layers of a network, and their predictions are averaged.")
    if demo.settings:
        lines.append("A router asks the next expert only where the prediction so far may be wrong.")
    return f"# {demo.name}\n\n{' '.join(lines)}"

"""The page: its tabs, and which answer goes where."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gradio as gr

from ssmclip.analyze.saliency.explanation import METHODS
from ssmclip.data.distortions import DISTORTIONS
from ssmclip.demo import answers, shown
from ssmclip.demo.inputs import labels_in, picture_in, text_in
from ssmclip.demo.session import Session

__all__ = ["TABS", "build_page"]

log = logging.getLogger(__name__)

SIZES = (64, 1024)  # pixels, the range of the slider
STEP = 32
EXAMPLES = "a dog\na cat\na bird"


def build_page(session: Session) -> gr.Blocks:
    """Return the page, without a server."""
    with gr.Blocks(title="ssmclip", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(shown.as_html("heading", session.names), js_on_load=None)
        with gr.Tabs():
            for title, build in TABS.items():
                with gr.Tab(title, id=title):
                    build(session)
    return page


# ---- The tabs


def _classify(session: Session) -> None:
    with gr.Row():
        with gr.Column(min_width=260):
            picture = _picture(session, "Picture", "classify-picture")
            labels = _labels(session, "classify-labels")
            template = gr.Textbox("{}", label="Template, with {} for the label", elem_id="classify-template")
            button = gr.Button("Classify", variant="primary", elem_id="classify-run")
        answer = _answer("classify-answer")

    def classify(path: str | None, labels: str, template: str) -> str:
        image = picture_in(path, session.limits)
        chosen = labels_in(labels, session.limits)
        found = answers.classified(session.subjects, image, chosen, text_in(template, session.limits))
        return shown.as_html("classified", found)

    _asks(classify, button, [picture, labels, template], answer, on_enter=[template])


def _search(session: Session) -> None:
    gallery = session.gallery
    if gallery is None:
        gr.Markdown(
            "There is no index to search. Make one with `ssmclip embed FOLDER --model MODEL --out index.parquet`, and "
            "open this page with `--index index.parquet`."
        )
        return
    with gr.Row():
        with gr.Column(min_width=260):
            text = gr.Textbox(label="Text", placeholder="a dog on a beach", elem_id="search-text")
            picture = _picture(session, "Or a picture", "search-picture")
            button = gr.Button("Search", variant="primary", elem_id="search-run")
        answer = _answer("search-answer", scale=2)

    def search(text: str, path: str | None) -> str:
        image = None if path is None else picture_in(path, session.limits)
        return shown.as_html("searched", answers.searched(gallery, text_in(text, session.limits), image))

    _asks(search, button, [text, picture], answer, on_enter=[text])


def _compare(session: Session) -> None:
    sides = []
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(min_width=260):
                picture = _picture(session, f"Picture, {side}", f"compare-picture-{side}")
                sides += [gr.Textbox(label=f"Or a text, {side}", elem_id=f"compare-text-{side}"), picture]
    button = gr.Button("Compare", variant="primary", elem_id="compare-run")
    answer = _answer("compare-answer")

    def compare(*values: str | None) -> str:
        texts = [text_in(text, session.limits) for text in values[::2]]
        images = [None if path is None else picture_in(path, session.limits) for path in values[1::2]]
        return shown.as_html("compared", answers.compared(session.subjects, *zip(texts, images, strict=True)))

    _asks(compare, button, sides, answer, on_enter=sides[::2])


def _resolution(session: Session) -> None:
    with gr.Row():
        with gr.Column(min_width=260):
            picture = _picture(session, "Picture", "resolution-picture")
            labels = _labels(session, "resolution-labels")
            size = gr.Slider(*SIZES, value=224, step=STEP, label="Image size in pixels", elem_id="resolution-size")
            button = gr.Button("Run at this size", variant="primary", elem_id="resolution-run")
        answer = _answer("resolution-answer")

    def resolution(path: str | None, labels: str, size: float) -> str:
        image, chosen = picture_in(path, session.limits), labels_in(labels, session.limits)
        return shown.as_html("costs", answers.at_size(session.subjects, image, chosen, int(size)))

    _asks(resolution, button, [picture, labels, size], answer)


def _distort(session: Session) -> None:
    first = next(iter(DISTORTIONS))
    with gr.Row():
        with gr.Column(min_width=260):
            picture = _picture(session, "Picture", "distort-picture")
            labels = _labels(session, "distort-labels")
            name = gr.Dropdown(list(DISTORTIONS), value=first, label="Distortion", elem_id="distort-name")
            level = _level(first)
            button = gr.Button("Distort", variant="primary", elem_id="distort-run")
        answer = _answer("distort-answer")
    name.change(_level, name, level, api_visibility="private", show_progress="hidden")

    def distort(path: str | None, labels: str, name: str, level: str) -> str:
        image, chosen = picture_in(path, session.limits), labels_in(labels, session.limits)
        tables = session.tables_of(name)
        return shown.distorted(answers.distorted(session.subjects, image, chosen, name, text_in(level), tables))

    _asks(distort, button, [picture, labels, name, level], answer)


def _level(name: str) -> gr.Dropdown:
    """The levels of a distortion. Others can be typed; whether it takes them is for `ssmclip.distort` to say."""
    chosen = DISTORTIONS[name]
    return gr.Dropdown(
        list(chosen.levels),
        value=list(chosen.levels)[len(chosen.levels) // 2],
        allow_custom_value=True,
        label=f"Level: {chosen.meaning}",
        elem_id="distort-level",
    )


def _look(session: Session) -> None:
    with gr.Row():
        with gr.Column(min_width=260):
            picture = _picture(session, "Picture", "look-picture")
            text = gr.Textbox(label="Text to look for, or a class", placeholder="a dog", elem_id="look-text")
            method = gr.Dropdown(list(METHODS), value=next(iter(METHODS)), label="Method", elem_id="look-method")
            with gr.Accordion("Position whose scan is shown", open=False):
                across = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the width")
                down = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the height")
            button = gr.Button("Look", variant="primary", elem_id="look-run")
        answer = _answer("look-answer", scale=2)

    def look(path: str | None, text: str, method: str, across: float, down: float) -> str:
        image, query = picture_in(path, session.limits), text_in(text, session.limits)
        return shown.looked_at(answers.looked_at(session.subjects, image, query, method, (across, down)))

    _asks(look, button, [picture, text, method, across, down], answer, on_enter=[text])


# In the order of the page.
TABS: dict[str, Callable[[Session], None]] = {
    "Classify": _classify,
    "Search": _search,
    "Compare": _compare,
    "Resolution": _resolution,
    "Distort": _distort,
    "Where it looks": _look,
}


# ---- Their parts


def _picture(session: Session, label: str, name: str) -> gr.Image:
    """A box for a picture, whose value is the path of the upload: what is no picture is refused by `picture_in`."""
    box = gr.Image(
        type="filepath", sources=["upload", "clipboard"], label=label, elem_id=name, height=260, buttons=["fullscreen"]
    )
    box.preprocess = partial(_uploaded, Path(box.GRADIO_CACHE))
    if session.examples:
        gr.Examples(
            [[str(file)] for file in session.examples], [box], label="Pictures to try", api_visibility="private"
        )
    return box


def _uploaded(folder: Path, upload: Any) -> str | None:
    """The path of an upload. Raises ValueError for any other file: a request may name what it likes."""
    if upload is None:
        return None
    if not Path(upload.path or "").resolve().is_relative_to(folder.resolve()):
        raise ValueError("a picture must be uploaded")
    return upload.path


def _labels(session: Session, name: str) -> gr.Textbox:
    return gr.Textbox(
        "\n".join(session.labels) if any(subject.model.tokenizer for subject in session.subjects) else "",
        lines=4,
        max_lines=12,
        label="Labels, one a line or with commas between",
        placeholder=EXAMPLES,
        elem_id=name,
    )


def _answer(name: str, scale: int = 1) -> gr.HTML:
    with gr.Column(min_width=260, scale=scale):
        return gr.HTML("", elem_id=name, js_on_load=None, min_height=80)


def _asks(
    answer: Callable[..., str],
    button: gr.Button,
    inputs: Sequence[Any],
    output: gr.HTML,
    on_enter: Sequence[gr.Textbox] = (),
) -> None:
    """Have a button, and the enter key in some boxes, ask for an answer. Models answer one question at a time."""
    gr.on(
        [button.click, *(box.submit for box in on_enter)],
        _in_words(answer),
        list(inputs),
        output,
        concurrency_id="models",
        concurrency_limit=1,
        api_visibility="private",
    )


def _in_words(answer: Callable[..., str]) -> Callable[..., str]:
    """Return a function whose errors are sentences of the page."""

    @wraps(answer)
    def given(*values: Any) -> str:
        try:
            return answer(*values)
        except answers.CAUSES as error:
            return shown.as_html("alert", str(error) or type(error).__name__)
        except Exception:
            log.exception("an answer failed")
            return shown.as_html("alert", "this failed for a reason that the program does not know: its log has more")

    return given

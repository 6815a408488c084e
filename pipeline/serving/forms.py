"""The page's forms: a field per setting, by its name in the API; the model that is served says what they offer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.serving.client import Fields
from pyramid_flow.params import MAX_GUIDANCE, TEMPORAL_FACTOR

IMAGE = "input_reference"

Form = Mapping[str, gr.components.Component]
Values = dict[Any, Any]
"""What components hold or become, by the component."""


def form(*, from_image: bool) -> Form:
    """Place the fields of a video from text, or from a picture and text."""
    fields: dict[str, gr.components.Component] = {}
    if from_image:
        fields[IMAGE] = gr.Image(label="First frame", type="filepath", image_mode=None, sources=["upload"], height=240)
    fields["prompt"] = gr.Textbox(label="Prompt", placeholder="What to show", lines=3, max_lines=8)
    with gr.Row():
        fields["size"] = gr.Dropdown(label="Size", min_width=120)
        fields["num_frames"] = gr.Dropdown(label="Duration", min_width=120)
        fields["seed"] = gr.Textbox(label="Seed", placeholder="drawn", max_lines=1, min_width=120)
    with gr.Row():
        if not from_image:  # whose first frame is given
            fields["guidance_scale"] = _slider("Guidance scale")
        fields["video_guidance_scale"] = _slider("Video guidance scale")
    with gr.Accordion("Negative prompt", open=False):
        fields["negative_prompt"] = gr.Textbox(show_label=False, placeholder="What to avoid", lines=2, max_lines=8)
    return fields


def offered(fields: Form, model: Fields) -> Values:
    """Return the fields as a model has them: its sizes and lengths, and its own settings."""
    sizes, most, fps = model["sizes"], model["max_num_frames"], model["fps"]
    lengths = [(_length(count, fps), count) for count in range(1, most + 1, TEMPORAL_FACTOR)]
    later = "image_to_video_guidance_scale" if IMAGE in fields else "video_guidance_scale"
    own = {
        "size": gr.Dropdown(choices=sizes, value=sizes[0]),
        "num_frames": gr.Dropdown(choices=lengths, value=most),
        "guidance_scale": model["guidance_scale"],
        "video_guidance_scale": model[later],
        "negative_prompt": model["negative_prompt"],
    }
    return {field: own[name] for name, field in fields.items() if name in own}


def filled(fields: Form, video: Fields) -> Values:
    """Return the fields as a video was asked for; its picture is not known here."""
    settings = video | {"seed": str(video["seed"])}
    return {field: settings[name] for name, field in fields.items() if name != IMAGE}


def asked(fields: Form, values: Values) -> tuple[dict[str, str], bytes | None]:
    """Return what is in the fields as a create call has it: texts, and the picture."""
    given = {name: values[field] for name, field in fields.items() if name != IMAGE}
    if not given["seed"].strip():
        del given["seed"]
    picture = values[fields[IMAGE]] if IMAGE in fields else None
    return {name: str(value) for name, value in given.items()}, Path(picture).read_bytes() if picture else None


def _slider(label: str) -> gr.Slider:
    return gr.Slider(label=label, minimum=0, maximum=MAX_GUIDANCE, step=0.1, min_width=200)


def _length(num_frames: int, fps: int) -> str:
    return "still" if num_frames == 1 else f"{(num_frames - 1) / fps:.3g} s"

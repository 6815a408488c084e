"""Writes the sample table and its picture: nine prompts, one image-to-video row and one deliberately bad row."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
PROMPTS = (
    "a small red circle moves up and left on a dark background",
    "a large blue square moves right on a light background",
    "a green triangle drifts down over grey",
    "a yellow cross moves up on a dark background",
    "two minutes before the storm, waves on a northern shore",
    "a paper boat on a rainy street",
    "a fox runs through fresh snow",
    "lanterns rise over a lake at night",
    "a hot-air balloon passes a snowy mountain",
)
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("image", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("seed", pa.int64()),
        ("topic", pa.string()),
    ]
)


def rows() -> list[dict[str, object]]:
    """Return the rows; null means the checkpoint's preset, and `topic` is a column of the user's own."""
    small = {"height": 64, "width": 128, "num_frames": 25}
    from_image = {"image": "first_frame.png", "seed": 7}
    shapes: list[dict[str, object]] = [{"prompt": prompt, "topic": "shapes"} for prompt in PROMPTS[:4]]
    return [
        *shapes,
        *({"prompt": prompt, **small, "topic": "scenes"} for prompt in PROMPTS[4:]),
        {"prompt": "the orange disc rolls to the right", **from_image, "topic": "image"},
        {"prompt": "a height that no model can render", "height": 700, "topic": "deliberately bad"},
    ]


def main() -> None:
    """Write first_frame.png and prompts.parquet beside this file."""
    picture = Image.new("RGB", (256, 256), (28, 34, 58))
    ImageDraw.Draw(picture).ellipse((40, 100, 140, 200), fill=(240, 140, 40))
    picture.save(HERE / "first_frame.png")
    pq.write_table(pa.Table.from_pylist(rows(), SCHEMA), HERE / "prompts.parquet")


if __name__ == "__main__":
    main()

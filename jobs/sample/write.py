"""Writes the sample table and its picture: ten prompts, one image-to-video row and one deliberately bad row."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pyramid_flow.toy.world import Scene

HERE = Path(__file__).parent
PROMPTS = (
    "a large red circle moves quickly up and left on a dark background",
    "a medium blue square moves slowly right on a grey background",
    "a large green triangle moves quickly down on a brown background",
    "a large yellow cross moves slowly up on a dark background",
    "a medium cyan circle moves quickly left on a grey background",
    "a large purple square moves quickly down and right on a dark background",
    "a large white triangle moves slowly up and right on a brown background",
    "a medium orange cross moves quickly right on a dark background",
    "a large cyan square moves slowly down and left on a brown background",
)
SHORT = {"prompt": "a large white circle moves quickly up on a grey background", "num_frames": 17}
FIRST = Scene("orange", "circle", "large", "right", "quickly", "dark", start=(0.27, 0.6))
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
    whole: list[dict[str, object]] = [{"prompt": prompt, "topic": "whole"} for prompt in PROMPTS]
    return [
        *whole,
        SHORT | {"topic": "half as long"},
        {"prompt": FIRST.caption, "image": "first_frame.png", "seed": 7, "topic": "from an image"},
        {"prompt": "a height that no model can render", "height": 700, "topic": "deliberately bad"},
    ]


def main() -> None:
    """Write first_frame.png and prompts.parquet beside this file."""
    Image.fromarray(FIRST.render(num_frames=1, side=256)[0]).save(HERE / "first_frame.png")
    pq.write_table(pa.Table.from_pylist(rows(), SCHEMA), HERE / "prompts.parquet")


if __name__ == "__main__":
    main()

"""Clips out of video files: what is cut, what is refused, and that a bad row is left out with its reason."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.media.video import VideoWriter
from pipeline.request import RequestError
from pipeline.tables.readers import list_parts
from pipeline.training.clips import SampleError, encoded
from pipeline.training.encode import ClipEncoder, Source, units
from pipeline.training.videos import ClipFormat, VideoRoot
from tests.pyramid_flow.goldens import TINY_MINIFLUX

FORMAT = ClipFormat(height=64, width=64, num_frames=9, fps=12)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a wide video of 24 frames at 24 fps: left half red, right half blue, middle green."""
    frames = np.zeros((24, 64, 256, 3), np.uint8)
    frames[:, :, :128, 0] = frames[:, :, 128:, 2] = 200
    frames[:, :, 96:160] = (0, 200, 0)
    with VideoWriter(tmp_path / "wide.mp4", width=256, height=64, fps=24) as writer:
        writer.write(frames)
    (tmp_path / "none.mp4").write_bytes(b"no video")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/wide.mp4\n#EXT-X-ENDLIST\n")
    return tmp_path


def test_the_middle_of_the_first_frames_is_cut_out(folder):
    clip = FORMAT.cut((folder / "wide.mp4").read_bytes())
    assert clip.shape == (9, 64, 64, 3)
    assert np.abs(clip.astype(int) - (0, 200, 0)).max() < 30


@pytest.mark.parametrize(
    ("name", "reason"),
    [("wide.mp4", "has 12 frames at 12 fps, 17 are needed"), ("none.mp4", "decode"), ("list.m3u8", "decode")],
)
def test_what_is_too_short_or_no_video_is_refused(folder, name, reason):
    with pytest.raises(SampleError, match=reason):
        ClipFormat(64, 64, 17, 12).cut((folder / name).read_bytes())


def test_videos_outside_the_root_are_refused(folder):
    (folder / "below").mkdir()
    root = VideoRoot(str(folder / "below"))
    with pytest.raises(RequestError, match="lies outside the video root"):
        root.read("../wide.mp4")
    assert VideoRoot(str(folder)).read("wide.mp4")


def test_bad_rows_are_left_out_with_their_reason(folder):
    rows = [
        {"prompt": "green", "video": "wide.mp4"},
        {"prompt": "broken", "video": "none.mp4"},
        {"prompt": None, "video": "wide.mp4"},
        {"prompt": "gone", "video": "absent.mp4"},
        {"prompt": "nothing", "video": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    source = Source(str(TINY_MINIFLUX), None, "cpu", torch.float32, VideoRoot(str(folder)), FORMAT)
    [part] = list_parts([str(folder / "in.parquet")])
    [unit] = units([part])
    done = ClipEncoder(source, str(folder / "out")).encode(0, unit)
    assert done.rows == 5
    assert [reason.partition(": ")[0].rpartition(":")[2] for reason in done.left_out] == ["1", "2", "3", "4"]
    table = pq.read_table(folder / "out" / "part-000000.parquet")
    assert table["prompt"].to_pylist() == ["green"]
    assert encoded(table, 2).latents.shape == (1, 16, 2, 8, 8)


def test_a_frame_of_any_shape_is_cut(tmp_path):
    with VideoWriter(tmp_path / "tall.mp4", width=16, height=2048, fps=12) as writer:
        writer.write(np.zeros((9, 2048, 16, 3), np.uint8))
    assert FORMAT.cut((tmp_path / "tall.mp4").read_bytes()).shape == (9, 64, 64, 3)


def test_tables_are_divided_into_units(tmp_path):
    rows = [{"prompt": f"{number}", "video": "a.mp4"} for number in range(70)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
    (tmp_path / "b.csv").write_text("prompt,video\n" + "x,a.mp4\n" * 33)
    found = units(list_parts([str(tmp_path)]))
    assert [(unit.start, unit.stop) for unit in found] == [(0, 32), (32, 40), (0, 30), (0, 32), (32, 33)]

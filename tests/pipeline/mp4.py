"""Mp4 files read back: their frames, what they hold, and their container tags, as ffmpeg sees them."""

import os
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from pipeline.media.video import _CONTAINER_TAGS, _SCALE, Frames, VideoError, VideoWriter, _file_url, last_lines

# anchored to the line start: a line inside a printed tag begins with blanks and a colon
_STREAM_LINE = re.compile(
    r"^  Stream #0:\d+[^\n]*?: Video: (?P<codec>\w+)[^\n]*?, (?P<pixel_format>\w+)(?:\([^\n]*?\))?, \d+x\d+",
    re.MULTILINE,
)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, found by decoding all of it.

    Attributes:
        width, height: Pixels.
        frames: Number of frames that decode.
        fps: Frames per second.
        codec, pixel_format: ffmpeg's names, such as "h264" and "yuv420p".
    """

    width: int
    height: int
    frames: int
    fps: float
    codec: str
    pixel_format: str


def read_frames(path: str | os.PathLike[str]) -> Frames:
    """Decodes a whole video into memory, about twice height * width * 3 bytes per frame while it runs.

    Returns:
        uint8 RGB, [n, height, width, 3].

    Raises:
        VideoError: The file is missing, is no video, or does not decode.
    """
    info = probe(path)
    raw = _decode(path, "-vf", f"scale={_SCALE}", "-pix_fmt", "rgb24", "-f", "rawvideo").stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, info.height, info.width, 3).copy()


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Decodes a video once and tells what is in it.

    Raises:
        VideoError: The file is missing, is no video, or does not decode.
    """
    result = _decode(path, "-c:v", "rawvideo", "-f", "framecrc")
    stream = _STREAM_LINE.search(result.stderr.decode("utf-8", "replace"))
    lines = result.stdout.decode("ascii").splitlines()
    header = dict(line[1:].split(": ", 1) for line in lines if line.startswith("#"))
    if stream is None or "dimensions 0" not in header:
        raise VideoError(f"{path}: ffmpeg finds no video stream")
    width, height = header["dimensions 0"].split("x")
    return VideoInfo(
        width=int(width),
        height=int(height),
        frames=sum(not line.startswith("#") for line in lines),
        fps=float(1 / Fraction(header["tb 0"])),  # the time base of a constant-rate stream is one frame
        codec=stream["codec"],
        pixel_format=stream["pixel_format"],
    )


def read_tags(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the container tags of a video, without those that the container sets itself.

    Raises:
        VideoError: The file is missing or is no video.
    """
    raw = _run_ffmpeg(path, "-v", "error", "-i", _file_url(path), "-f", "ffmetadata", "pipe:1").stdout
    return {key: value for key, value in _parse_ffmetadata(raw) if key not in _CONTAINER_TAGS}


def _parse_ffmetadata(raw: bytes) -> list[tuple[str, str]]:
    # a backslash escapes the byte after it, also a line's end
    tags = []
    for line in re.findall(rb"(?:\\.|[^\\\n])+", raw, re.DOTALL):
        if line.startswith(b"["):  # sections of streams and chapters follow the container's tags
            break
        match = re.fullmatch(rb"((?:\\.|[^\\=;#])+)=(.*)", line, re.DOTALL)
        if match:
            key, value = (re.sub(rb"\\(.)", rb"\1", part, flags=re.DOTALL) for part in match.groups())
            tags.append((key.decode("utf-8", "replace"), value.decode("utf-8", "replace")))
    return tags


def _decode(path: str | os.PathLike[str], *output: str) -> subprocess.CompletedProcess[bytes]:
    return _run_ffmpeg(
        path, "-xerror", "-err_detect", "explode", "-i", _file_url(path), "-map", "0:v:0", *output, "pipe:1"
    )


def _run_ffmpeg(path: str | os.PathLike[str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", *arguments]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise VideoError(f"cannot start ffmpeg: {error}") from error
    if result.returncode:
        raise VideoError(f"{path}: ffmpeg failed with status {result.returncode}: {last_lines(result.stderr)}")
    return result


def black_video(folder: Path) -> bytes:
    """Make an mp4 of 9 frames, 64x64, with a prompt among its tags; folder: where it may lie meanwhile."""
    path = folder / "black.mp4"
    with VideoWriter(path, width=64, height=64, fps=24, tags={"prompt": "a red ball"}) as writer:
        writer.write(np.zeros((9, 64, 64, 3), np.uint8))
    return path.read_bytes()

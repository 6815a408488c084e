"""Videos in fragments, each encoded by itself: seen while they are made, and joined without being encoded again."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.media.video import EXACT, FINISHED, Frames, VideoError, encoding, ffmpeg, last_lines, tag_arguments

FRAGMENT = ("-movflags", "empty_moov+default_base_moof+frag_discont+frag_custom+skip_trailer", "-use_editlist", "0")
"""One fragment that says when it begins, without an index at its end."""

BLOCK, HEAD = 2**15, 8
"""Bytes that Chromium reads of a stream at once, and of the head of a box."""


def encode_fragment(frames: Frames, index: int, start: int, fps: float, *, threads: int = 1, crf: int = 18) -> bytes:
    """Encode the next frames [n,H,W,3], uint8 RGB, of a video; equal input gives equal bytes.

    index: of the fragment; start: frames before it. Fragment 0 begins with the head of the file; all of them one after
    another are a fragmented mp4 that plays as far as it has come. A fragment has one key frame, its first, and no frame
    waits for a later one. Raises VideoError.
    """
    _, height, width, _ = frames.shape
    command = [
        *encoding(f"{width}x{height}", fps, threads, crf),
        *("-tune", "zerolatency", "-sc_threshold", "0"),  # equal for all, as only the first says how to decode them
        *("-output_ts_offset", f"{start / fps:.6f}", "-avoid_negative_ts", "disabled"),
        *(*FRAGMENT, "-fragment_index", str(index + 1), "-f", "mp4", "pipe:1"),
    ]
    data = _run(command, frames.tobytes())
    return data if index == 0 else data[data.index(b"moof") - 4 :]


def padded(fragment: bytes) -> bytes:
    """Return a fragment with an empty box after it, for a browser that takes data in blocks of `BLOCK` bytes only."""
    size = HEAD + -(len(fragment) + HEAD) % BLOCK
    return fragment + size.to_bytes(4) + b"free" + bytes(size - HEAD)


def join_fragments(fragments: Sequence[bytes], tags: Mapping[str, str]) -> bytes:
    """Return the finished mp4 with container tags (see `VideoWriter`): the same pictures. Raises VideoError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        command = [*ffmpeg(), "-i", "pipe:0", "-c", "copy", *EXACT, *FINISHED, *tag_arguments(tags), str(path)]
        _run(command, b"".join(fragments))
        return path.read_bytes()


def _run(command: Sequence[str], data: bytes) -> bytes:
    done = subprocess.run(command, input=data, capture_output=True, check=False, process_group=0)
    if done.returncode:
        raise VideoError(f"ffmpeg failed with status {done.returncode}: {last_lines(done.stderr)}")
    return done.stdout

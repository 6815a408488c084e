"""Clips out of video files: of one size, rate and length, as a model is trained on."""

import subprocess
import tempfile
from dataclasses import dataclass
from typing import ClassVar

import imageio_ffmpeg
import numpy as np

from pipeline.tables.images import ImageRoot
from pipeline.training.clips import Frames, SampleError

MAX_VIDEO_BYTES = 2**30
MAX_PIXELS = 2**25  # of a frame
TIMEOUT_S = 600
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
"""What ffmpeg may take a file for: no playlist, which could name other files."""


@dataclass(frozen=True)
class VideoRoot(ImageRoot):
    """The folder or URL below which a video's URI must lie."""

    kind: ClassVar[str] = "video"
    max_bytes: ClassVar[int] = MAX_VIDEO_BYTES


@dataclass(frozen=True)
class ClipFormat:
    """What is cut out of a video: of its first `num_frames` at `fps`, the centre in the size's shape, scaled to it."""

    height: int
    width: int
    num_frames: int
    fps: float

    def cut(self, data: bytes) -> Frames:
        """Decode a video file: uint8 [num_frames,height,width,3]; SampleError if it is none, or too short."""
        shape = self.width / self.height
        centre = f"crop=min(iw\\,ih*{shape:.6f}):min(ih\\,iw/{shape:.6f})"
        filters = f"fps={self.fps:g},{centre},scale={self.width}:{self.height}"
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            source = ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-max_pixels", str(MAX_PIXELS)]
            target = ["-i", f"file:{file.name}", "-map", "0:v:0", "-frames:v", str(self.num_frames), "-vf", filters]
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *target]
            raw = ["-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
            try:
                done = subprocess.run(
                    [*command, *raw], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=TIMEOUT_S
                )
            except subprocess.TimeoutExpired as error:
                raise SampleError(f"the video does not decode within {TIMEOUT_S} s") from error
        if done.returncode:
            raise SampleError(f"the video does not decode: {done.stderr.decode(errors='replace').strip()[-200:]}")
        frames: Frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, self.height, self.width, 3)
        if len(frames) < self.num_frames:
            raise SampleError(f"the video has {len(frames)} frames at {self.fps:g} fps, {self.num_frames} are needed")
        return frames

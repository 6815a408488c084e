"""Make tables to train on (`python -m jobs.dataset world|encode`): clips of the toy's world, and encoded clips."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from jobs.settings import EXIT_WRONG_JOB, EncodeSettings, WorldSettings, parse
from pipeline import runner
from pipeline.inputs import folder_of, full_url, list_parts
from pipeline.plan import Resources
from pipeline.request import hash_of
from pipeline.storage import Storage
from pipeline.training.clips import CLIP_SCHEMA, clip_row
from pipeline.training.encode import Source, encode, units
from pipeline.training.record import check_record
from pipeline.training.videos import ClipFormat, VideoRoot
from pyramid_flow import Checkpoint, Preset
from pyramid_flow.checkpoint import DTYPES
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.params import check_num_frames, check_size
from pyramid_flow.toy.world import draw_scene

ROWS_PER_GROUP = 32
RECORD = "encoding.json"

logger = logging.getLogger("jobs.dataset")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named first; returns its exit code."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    commands = {"world": world, "encode": encode_clips}
    if name not in commands:
        logger.error("jobs.dataset: no command %r; there are: %s", name, ", ".join(commands))
        return EXIT_WRONG_JOB
    try:
        commands[name](arguments)
    except PyramidFlowError as error:
        logger.error("jobs.dataset: %s", error)
        return EXIT_WRONG_JOB
    return 0


def world(argv: Sequence[str]) -> None:
    """Draw clips of the toy's world."""
    settings = parse(WorldSettings, argv)
    check_num_frames(settings.num_frames)
    path = Path(settings.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, CLIP_SCHEMA, compression="zstd") as writer:
        for start in tqdm(range(0, settings.count, ROWS_PER_GROUP), unit=" groups"):
            numbers = range(start, min(start + ROWS_PER_GROUP, settings.count))
            scenes = [draw_scene(Random(f"{settings.seed} {number}"), tuple(settings.sizes)) for number in numbers]
            rows = [clip_row(scene.caption, scene.render(settings.num_frames, settings.side)) for scene in scenes]
            writer.write_table(pa.Table.from_pylist(rows, CLIP_SCHEMA))


def encode_clips(argv: Sequence[str]) -> None:
    """Encode clips with a checkpoint's VAE and text encoders."""
    settings = parse(EncodeSettings, argv)
    checkpoint = Checkpoint.open(settings.model, settings.variant)
    checkpoint.check()
    parts = list_parts(settings.input)
    todo = units(parts)
    storage = Storage(settings.output)
    storage.probe()
    source = Source(
        path=checkpoint.path,
        variant=checkpoint.variant,
        device="cuda" if settings.use_gpu else "cpu",
        dtype=DTYPES[settings.dtype],
        videos=VideoRoot(full_url(settings.video_root) if settings.video_root else folder_of(settings.input[0])),
        format=_clip_format(settings, checkpoint.preset),
    )
    check_record(
        storage,
        RECORD,
        {
            "model_fingerprint": checkpoint.fingerprint,
            "dtype": settings.dtype,
            "clips": asdict(source.format),
            "input": hash_of({"parts": [asdict(part) for part in parts]}),
        },
    )
    own = settings.own_cluster
    resources = Resources(settings.workers + 1, settings.workers if settings.use_gpu else 0)
    with (
        runner.session(None if own else settings.address, resources if own else None),
        tqdm(total=sum(unit.stop - unit.start for unit in todo), unit=" clips") as bar,
    ):
        for done in encode(todo, source, storage.uri, settings.workers):
            bar.update(done.rows)
            for reason in done.left_out:
                logger.warning("left out: %s", reason)


def _clip_format(settings: EncodeSettings, preset: Preset) -> ClipFormat:
    height, width = preset.sizes[0]
    clip = ClipFormat(
        height=settings.height or height,
        width=settings.width or width,
        num_frames=settings.num_frames or preset.max_num_frames,
        fps=settings.fps or preset.fps,
    )
    check_num_frames(clip.num_frames)
    check_size("height", clip.height)
    check_size("width", clip.width)
    return clip


if __name__ == "__main__":
    sys.exit(main())

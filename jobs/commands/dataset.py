"""Make data sets (`pyramid-render dataset`): of prompts by a recipe or a suite, rendered; and tables to train on."""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from jobs.commands import render
from jobs.settings import EXIT_WRONG_JOB, EncodeSettings, GenerateSettings, VBenchSettings, WorldSettings
from jobs.settings.dataset import MadeTableSettings
from pipeline.batch import runner
from pipeline.batch.planner import Resources
from pipeline.datasets import vbench
from pipeline.datasets.prompts import Recipe, as_parquet, make_table, summary
from pipeline.request import hash_of
from pipeline.storage.storage import Storage
from pipeline.tables.readers import folder_of, full_url, list_parts
from pipeline.training.clips import CLIP_SCHEMA, clip_row
from pipeline.training.encode import Source, encode, units
from pipeline.training.record import check_record
from pipeline.training.videos import ClipFormat, VideoRoot
from pyramid_flow import Checkpoint, Preset
from pyramid_flow.checkpoints.checkpoint import DTYPES
from pyramid_flow.errors import PyramidFlowError
from pyramid_flow.sampling.params import check_num_frames, check_size
from pyramid_flow.toy.world import draw_scene

ROWS_PER_GROUP = 32
RECORD = "encoding.json"
TABLE, TABLE_RECORD = "prompts.parquet", "prompts.json"

Settings = GenerateSettings | VBenchSettings | WorldSettings | EncodeSettings

logger = logging.getLogger("jobs.commands.dataset")


def run(settings: Settings) -> int:
    """Run the job that these settings are of; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        match settings:
            case GenerateSettings():
                return _generate(settings)
            case VBenchSettings():
                return _suite(settings)
            case WorldSettings():
                return _world(settings)
            case EncodeSettings():
                return _encode(settings)
    except PyramidFlowError as error:
        logger.error("%s: %s", settings.model_config["cli_prog_name"], error)
        return EXIT_WRONG_JOB


def _generate(settings: GenerateSettings) -> int:
    """Make a table of prompts from a recipe, and render it."""
    recipe = Recipe.read(settings.recipe)

    def make() -> pa.Table:
        table = make_table(recipe)
        for line in summary(recipe, table):
            logger.info("%s", line)
        return table

    return _render(settings, recipe.model_dump(mode="json", exclude_defaults=True), make)


def _suite(settings: VBenchSettings) -> int:
    """Render a suite of prompts, and gather its videos under the names that VBench looks for."""
    prompts = vbench.read_suite(settings.suite)
    storage = Storage(settings.output)
    folder = settings.videos or vbench.default_folder(storage)
    record = {"suite": hash_of({"prompts": prompts}), "samples": settings.samples, "fields": settings.fields}
    code = _render(settings, record, lambda: vbench.suite_table(prompts, settings.samples, settings.fields))
    if not settings.only_table and not settings.dry_run and code in (0, render.EXIT_SOME_FAILED):
        count = vbench.gather(storage, prompts, settings.samples, folder)
        print(f"  {count} of {len(prompts) * settings.samples} videos of the suite are in {folder}")
    return code


def _render(settings: MadeTableSettings, record: Mapping[str, object], make: Callable[[], pa.Table]) -> int:
    """Make the table unless it is there, and render it; raises RecordError if the output's is made of something else.

    record: what the table is made of.
    """
    storage = Storage(settings.output)
    check_record(storage, TABLE_RECORD, record)
    if not storage.exists(TABLE):
        storage.put(TABLE, as_parquet(make()))
    url = storage.url(TABLE)
    if settings.only_table:
        print(url)
        return 0
    return render.run(settings.model_copy(update={"input": [url]}))


def _world(settings: WorldSettings) -> int:
    """Draw clips of the toy's world."""
    check_num_frames(settings.num_frames)
    path = Path(settings.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, CLIP_SCHEMA, compression="zstd") as writer:
        for start in tqdm(range(0, settings.count, ROWS_PER_GROUP), unit=" groups"):
            numbers = range(start, min(start + ROWS_PER_GROUP, settings.count))
            scenes = [draw_scene(Random(f"{settings.seed} {number}"), tuple(settings.sizes)) for number in numbers]
            rows = [clip_row(scene.caption, scene.render(settings.num_frames, settings.side)) for scene in scenes]
            writer.write_table(pa.Table.from_pylist(rows, CLIP_SCHEMA))
    return 0


def _encode(settings: EncodeSettings) -> int:
    """Encode clips with a checkpoint's VAE and text encoders."""
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
    return 0


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

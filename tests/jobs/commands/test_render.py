"""The render job from its flags to its exit code; real Ray where rows are rendered."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import cli
from jobs.commands import render
from jobs.settings import RenderSettings
from jobs.summary import plan_text
from pipeline.batch.job import StopRequest
from pipeline.batch.planner import Resources
from pipeline.ledger import job_records, ledger
from pipeline.ledger.compact import find_orphans
from pipeline.media.provenance import KEY, REQUEST
from pipeline.storage.storage import Storage
from pyramid_flow import Checkpoint
from tests.pipeline.certificates import identity, manifest_of
from tests.pipeline.mp4 import probe
from tests.pipeline.sample_tables import write_table
from tests.pyramid_flow.goldens import save_adapter

SMALL = {"num_frames": 9, "num_inference_steps": 2, "video_num_inference_steps": 1}
LONG = {**SMALL, "num_frames": 17}


def settings(table: Path, output: Path, **values: object) -> RenderSettings:
    return RenderSettings(input=[str(table)], output=str(output), model="toy", device="cpu", **values)


def run(job_settings: RenderSettings, cluster: Resources) -> tuple[render.RenderJob, int]:
    """Execute a job on the session's cluster; returns it and the number of rows that went through the pipeline."""
    job = render.prepare(job_settings, cluster)
    finished = []
    job.execute(lambda batch: finished.extend(batch.items if batch else []))
    return job, len(finished)


def flags(table: Path, output: Path, *more: str) -> list[str]:
    return ["--input", str(table), "--output", str(output), "--model", "toy", "--device", "cpu", *more]


@dataclass(frozen=True)
class Rendered:
    """A finished job: its table, its ledger's rows, and how many of them went through the pipeline."""

    table: Path
    job: render.RenderJob
    rows: list[dict[str, object]]
    count: int

    @property
    def by_id(self) -> dict[str, dict[str, object]]:
        return {row["id"]: row for row in self.rows}

    @property
    def alone(self) -> list[dict[str, object]]:
        """The rows that were in a batch of their own."""
        return [row for row in self.rows if row["batch_size"] == 1 and row["duplicate_of"] is None]

    def noted(self, note: str) -> dict[str, object]:
        """Return the only row that carries a note of the table."""
        [row] = [row for row in self.rows if row["note"] == note]
        return row


def halved(resources: Resources) -> Resources:
    """Return half of the cluster: what one of two workers gets. Threads of a worker decide how sums are split."""
    return replace(resources, cpus=resources.cpus // 2)


def table_again(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    """Write a table that asks for rows of a ledger once more."""
    names = ("id", "prompt", "seed", "num_frames")
    return write_table(path, [SMALL | {name: row[name] for name in names} for row in rows])


def check_files(job: render.RenderJob) -> None:
    """Check that every file in the ledger is whole and what its row says, and that there is no other file."""
    rows = [row for row in job.view().to_pylist() if row["status"] == "succeeded"]
    for row in rows:
        file = job.storage.get(row["uri"])
        assert (hashlib.sha256(file).hexdigest(), len(file)) == (row["sha256"], row["bytes"])
        if row["media_type"] == "video/mp4":
            info = probe(Path(job.storage.url(row["uri"]).removeprefix("file://")))
            assert (info.height, info.width, info.frames) == (row["height"], row["width"], row["num_frames"])
    assert sorted({row["uri"] for row in rows}) == sorted(job.storage.list("videos") + job.storage.list("images"))
    assert find_orphans(job.storage) == []


@pytest.fixture(scope="module")
def rendered(cluster, tmp_path_factory) -> Rendered:
    """Render videos and stills, duplicates, copies, conflicts and a row that cannot be rendered, in one job."""
    folder, still = tmp_path_factory.mktemp("rendered"), {**SMALL, "num_frames": 1}
    table = [
        {"id": "video", "prompt": "a fox", "seed": 1, **SMALL},
        {"id": "still", "prompt": "a fox", "seed": 1, **still},
        {"id": "webp", "prompt": "a fox", "seed": 1, **still, "image_format": "webp", "guidance_decay": 0.5},
        {"note": "first", "prompt": "twice", **SMALL},
        {"note": "bad size", "prompt": "a ball", "height": 100, "width": 64, "num_frames": 9},
        {"note": "second", "prompt": "twice", **SMALL},
        {"id": "mine", "prompt": "one thing", **SMALL},
        {"id": "mine", "prompt": "another thing", **SMALL},
        {"id": "copies", "prompt": "many", "num_videos_per_prompt": 3, "seed": 5, **SMALL},
        {"id": "long", "prompt": "a red circle", "seed": 3, **LONG},
    ]
    source = write_table(folder / "in.parquet", table)
    job, count = run(settings(source, folder / "out", batch_size=2), halved(cluster))
    return Rendered(source, job, job.view().to_pylist(), count)


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_every_row_is_in_the_ledger_once_and_every_file_is_whole(rendered):
    parts = [pq.read_table(path) for path in sorted((rendered.table.parent / "out" / "metadata").iterdir())]
    ids = pa.concat_tables(parts)["id"].to_pylist()
    assert Counter(ids) == Counter(set(rendered.job.worklist.expected_ids().to_pylist()))
    assert len(ids) == 12
    check_files(rendered.job)
    done = [row for row in rendered.rows if row["status"] == "succeeded"]
    assert len({row["sha256"] for row in done}) == len(done) - 1  # a duplicate has its original's file
    assert {row["batch_size"] for row in done} == {1, 2}
    state = json.loads(rendered.job.storage.get(f"runs/{rendered.job.run}.json"))["state"]
    assert state == "finished"
    rendered.job.write_gallery()
    assert rendered.job.storage.get("gallery.png").startswith(b"\x89PNG")


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_row_that_cannot_be_rendered_tells_its_position_and_reason(rendered):
    row = rendered.noted("bad size")
    assert (row["status"], row["position"]) == ("failed", f"file://{rendered.table}:4")
    assert row["error_message"] == "height 100 is not a multiple of 64: the nearest are 64 and 128"


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_stills_and_videos_of_one_table_share_job_and_ledger(rendered):
    rows = rendered.by_id
    media_types = {name: rows[name]["media_type"] for name in ("video", "still", "webp")}
    assert media_types == {"video": "video/mp4", "still": "image/png", "webp": "image/webp"}
    assert (rows["video"]["image_format"], rows["webp"]["guidance_decay"]) == (None, 0.5)
    assert rows["still"]["latents_sha256"] == rows["webp"]["latents_sha256"]


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_duplicates_copies_and_conflicting_ids_get_their_own_rows(rendered):
    rows, original, duplicate = rendered.by_id, rendered.noted("first"), rendered.noted("second")
    assert duplicate["id"] == f"{original['id']}-dup1"
    assert duplicate["duplicate_of"] == original["id"]
    assert (duplicate["uri"], duplicate["status"]) == (original["uri"], "succeeded")
    for name in ("mine", "mine-dup1"):
        assert rows[name]["status"] == "failed"
        assert f"{rendered.table}:6" in rows[name]["error_message"]
        assert f"{rendered.table}:7" in rows[name]["error_message"]
    assert [rows[f"copies-{i}"]["seed"] for i in range(3)] == [5, 6, 7]
    assert len(rendered.job.storage.list("videos")) == 6
    assert rendered.count == 9  # neither the duplicate nor those in conflict


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_finished_job_run_again_renders_nothing_and_says_what_there_is(rendered, capsys):
    assert cli.main(["render", *flags(rendered.table, rendered.table.parent / "out")]) == 3
    printed = capsys.readouterr().out
    assert "9 of 12 rows succeeded; this run took 0 rows" in printed
    for kind in ("images", "videos"):
        assert f"{kind}   file://{rendered.table.parent}/out/{kind}" in printed


@pytest.mark.ray
@pytest.mark.integration
def test_a_second_run_renders_only_what_is_missing(rendered, cluster, tmp_path):
    output = shutil.copytree(rendered.table.parent / "out", tmp_path / "out")
    added = write_table(tmp_path / "added.parquet", [{"note": "added", "prompt": "a hen", **SMALL}])
    tables = [pq.read_table(path) for path in (rendered.table, added)]
    source = tmp_path / "in.parquet"
    pq.write_table(pa.concat_tables(tables, promote_options="default"), source)
    assert render.prepare(settings(source, output), cluster).pending().num_rows == 1
    job, count = run(settings(source, output, retry_failed=True), cluster)
    assert count == 2  # the new row and the bad one
    assert Counter(job.view()["status"].to_pylist()) == {"succeeded": 10, "failed": 3}
    _, count = run(settings(source, output), cluster)
    assert count == 0


@pytest.mark.ray
@pytest.mark.integration
def test_adapters_change_the_videos_and_are_told_in_the_ledger(rendered, cluster, tmp_path):
    adapter = save_adapter(Checkpoint.open("toy").load_transformer(torch.float32, "cpu"), tmp_path / "style", seed=1)
    bare = rendered.by_id["long"]
    source = table_again(tmp_path / "in.parquet", [bare])
    hashes = {bare["latents_sha256"]}
    for lora, name in (([str(adapter)], "toy + style=1"), ([f"{adapter}=-1"], "toy + style=-1")):
        job, _ = run(settings(source, tmp_path / name, lora=lora), halved(cluster))
        [row] = job.view().to_pylist()
        assert (row["status"], row["model"]) == ("succeeded", name)
        hashes.add(row["latents_sha256"])
    assert bare["model"] == "toy"
    assert len(hashes) == 3


@pytest.mark.ray
@pytest.mark.integration
def test_latents_do_not_depend_on_workers_or_stages_apart(rendered, cluster, tmp_path):
    assert len(rendered.alone) == 2
    source = table_again(tmp_path / "in.parquet", rendered.alone)
    job, _ = run(settings(source, tmp_path / "out", batch_size=1, sample_workers=2), cluster)
    check_files(job)
    hashes = dict(zip(*(job.view()[name].to_pylist() for name in ("id", "latents_sha256")), strict=True))
    assert hashes == {row["id"]: row["latents_sha256"] for row in rendered.alone}


@pytest.mark.ray
@pytest.mark.integration
def test_workers_of_two_processes_render_what_one_does(rendered, cluster, tmp_path):
    source = table_again(tmp_path / "in.parquet", rendered.alone)
    job, _ = run(settings(source, tmp_path / "out", gpus_per_clip=2), cluster)
    together = job.view().select(["id", "seed", "status"]).to_pylist()
    assert {(row["id"], row["seed"]) for row in together} == {(row["id"], row["seed"]) for row in rendered.alone}
    assert {row["status"] for row in together} == {"succeeded"}


@pytest.mark.ray
@pytest.mark.integration
def test_flagged_rows_are_rendered_again_with_another_seed(cluster, tmp_path, capsys):
    source = write_table(
        tmp_path / "in.parquet", [{"id": name, "prompt": "a fox", "seed": 1, **SMALL} for name in "ab"]
    )
    first, rendered = run(settings(source, tmp_path / "out", black_below=1), cluster)
    before = {row["id"]: row for row in first.view().to_pylist()}
    again, rerolled = run(settings(source, tmp_path / "out", black_below=1, reroll=2), cluster)
    assert (rendered, rerolled) == (2, 4)
    for row in again.view().to_pylist():
        old = before[row["id"]]
        assert (old["rerolls"], old["seed"], old["flags"]) == (0, 1, ["black"])
        assert (row["rerolls"], row["first_seed"], row["flags"]) == (2, 1, ["black"])
        assert (row["seed"] != 1, row["latents_sha256"] != old["latents_sha256"]) == (True, True)
        assert (tmp_path / "out" / row["uri"]).is_file()
        assert row["brightness"] > 0
    assert cli.main(["render", *flags(source, tmp_path / "out", "--reroll", "2")]) == 0
    printed = capsys.readouterr().out
    assert "this run took 0 rows" in printed
    assert "flagged, 2 rows: 2 black" in printed
    assert "rendered again with another seed: 2 rows" in printed
    assert cli.main(["render", *flags(source, tmp_path / "out", "--reroll", "3", "--dry-run")]) == 0
    assert "2 flagged ones to render again" in capsys.readouterr().out


def test_a_limit_renders_the_first_rows_and_a_later_run_the_others(tmp_path):
    rows = [{"id": name, "prompt": "a fox", **SMALL} for name in "abc"]
    source = write_table(tmp_path / "in.parquet", rows)
    first = render.prepare(settings(source, tmp_path / "out", limit=2), Resources(2, 0))
    assert first.worklist.expected_ids().to_pylist() == ["a", "b"]
    assert "1 outside of this shard or limit" in plan_text(first, None)
    later = render.prepare(settings(source, tmp_path / "out"), Resources(2, 0))
    assert later.worklist.expected_ids().to_pylist() == ["a", "b", "c"]


def test_other_adapters_into_the_same_output_are_refused(tmp_path, caplog):
    adapter = save_adapter(Checkpoint.open("toy").load_transformer(torch.float32, "cpu"), tmp_path / "style", seed=1)
    source = write_table(tmp_path / "in.parquet", [{"prompt": "a red circle", **SMALL}])
    render.prepare(settings(source, tmp_path / "out", lora=[str(adapter)]), Resources(2, 0))
    assert cli.main(["render", *flags(source, tmp_path / "out", "--lora", f"{adapter}=0.5")]) == 2
    assert "model_fingerprint" in caplog.text


@pytest.mark.ray
@pytest.mark.integration
def test_files_are_signed_by_workers_of_an_own_cluster(tmp_path):
    source = write_table(tmp_path / "in.parquet", [{"id": "fox", "prompt": "a fox", **SMALL}])
    own, chain = identity(), tmp_path / "chain.pem"
    chain.write_text(own.certificates)
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "render",
        *flags(source, tmp_path / "out", "--c2pa-certificate", str(chain)),
    ]
    subprocess.run(command, env=os.environ | {KEY: own.key}, check=True)
    [row] = ledger.read(Storage(str(tmp_path / "out"))).to_pylist()
    video = (tmp_path / "out" / row["uri"]).read_bytes()
    assert (hashlib.sha256(video).hexdigest(), len(video)) == (row["sha256"], row["bytes"])
    manifest, objections = manifest_of(video, "video/mp4")
    assert objections == {"signingCredential.untrusted"}
    [told] = [each["data"] for each in manifest["assertions"] if each["label"] == REQUEST]
    for name in ("id", "prompt", "seed", "guidance_scale", "model", "model_fingerprint", "software_version"):
        assert told[name] == row[name]
    assert own.key.splitlines()[1] not in (tmp_path / "out" / "job.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such/model"}, "there is no checkpoint folder"),
        ({"input": "no/such/table.parquet"}, "neither a file nor a folder"),
        ({"input": "nowhere://bucket/table.parquet"}, "cannot be listed"),
        ({"output": "nowhere://bucket/out"}, "nowhere"),
        ({"variant": "768p"}, "has no variant '768p'"),
        ({"device": "cuda", "gpus": "0"}, "wants GPUs"),
        ({"lora": "no/such/adapter"}, "has no file adapter_config.json"),
        ({"lora": "style=much"}, "is not PATH or PATH=WEIGHT"),
        ({"gpus-per-clip": "5"}, "cannot share 6 attention heads; possible are 1, 2, 3, 4, 6, 12"),
        ({"image-text-model": "no/such/clip"}, "has no config.json; a CLIP model has"),
        ({"c2pa-certificate": "no/such/chain.pem"}, "c2pa_certificate cannot be read"),
        ({"c2pa-certificate": __file__}, "the certificate is not one in PEM"),
    ],
)
def test_a_wrong_job_exits_2_with_one_line(change, message, tmp_path, caplog):
    source = write_table(tmp_path / "in.parquet", [{"prompt": "x"}])
    arguments = {"input": str(source), "output": str(tmp_path / "out"), "model": "toy"} | change
    assert cli.main(["render", *[part for name, value in arguments.items() for part in (f"--{name}", value)]]) == 2
    [record] = caplog.records
    assert message in record.message
    assert "\n" not in record.message
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_exits_2(tmp_path, caplog):
    (tmp_path / "out").write_text("a file")
    source = write_table(tmp_path / "in.parquet", [{"prompt": "x"}])
    assert cli.main(["render", *flags(source, tmp_path / "out")]) == 2
    assert "not writable" in caplog.text


def test_another_model_into_the_same_output_is_refused(tmp_path, caplog):
    source = write_table(tmp_path / "in.parquet", [{"prompt": "x"}])
    job_records.claim(Storage(str(tmp_path / "out")), {}, {"model_fingerprint": "other"})
    assert cli.main(["render", *flags(source, tmp_path / "out")]) == 2
    assert "model_fingerprint 'other'" in caplog.text


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "tables"), ("pictures", "pictures"), ("not/there", "not/there")]
)
def test_the_image_root_is_the_inputs_folder_or_what_is_said(given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("tables", "pictures"):
        (tmp_path / folder).mkdir()
    source = write_table(Path("tables") / "in.parquet", [{"prompt": "x", **SMALL}])
    job = render.prepare(settings(source, tmp_path / "out", image_root=given), Resources(2, 0))
    assert job.plan.pools[0].stages[0].arguments["image_root"] == f"file://{tmp_path / expected}"


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    source = write_table(tmp_path / "in.parquet", [{"prompt": f"{i}", **SMALL} for i in range(3)])
    arguments = flags(source, tmp_path / "out", "--dry-run", "--sample-workers", "2")
    assert cli.main(["render", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "3 rows to render" in printed
    assert re.search(r"expected: [0-9.]+ videos per hour, [0-9.]+ hours for 3 rows", printed)
    assert "assumed from FLOPs" in printed
    assert any(line.split()[:2] == ["sample+decode", "2"] for line in printed.splitlines())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_that_the_output_belongs_to_another_job(tmp_path, caplog):
    source = write_table(tmp_path / "in.parquet", [{"prompt": "x"}])
    pixels = {"model_fingerprint": "another", "dtype": "float32", "tile": None}
    job_records.claim(Storage(str(tmp_path / "out")), {}, pixels)
    assert cli.main(["render", *flags(source, tmp_path / "out", "--dry-run")]) == 2
    assert "was rendered with model_fingerprint 'another'" in caplog.records[-1].message


def test_an_empty_table_is_a_finished_job(tmp_path, capsys):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "in.parquet")
    assert cli.main(["render", *flags(tmp_path / "in.parquet", tmp_path / "out")]) == 0
    assert "0 of 0 rows succeeded" in capsys.readouterr().out


def test_an_interrupt_while_the_input_is_read_is_no_traceback(tmp_path, monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(render, "scan", interrupted)
    source = write_table(tmp_path / "in.parquet", [{"prompt": "x"}])
    assert cli.main(["render", *flags(source, tmp_path / "out")]) == 130
    assert "nothing was rendered" in caplog.text


def test_an_output_inside_the_input_folder_exits_2(tmp_path, caplog):
    write_table(tmp_path / "in.parquet", [{"prompt": "x"}])
    assert cli.main(["render", *flags(tmp_path, tmp_path / "out")]) == 2
    assert "lies inside the input folder" in caplog.text


def test_more_gpus_than_the_machine_has_exits_2(tmp_path, caplog):
    source = write_table(tmp_path / "in.parquet", [{"prompt": "x"}])
    assert cli.main(["render", *flags(source, tmp_path / "out", "--gpus", "99")]) == 2
    assert "--gpus 99" in caplog.text


@pytest.mark.ray
@pytest.mark.integration
def test_an_interrupted_job_keeps_what_is_done_and_resumes(tmp_path):
    source = write_table(tmp_path / "in.parquet", [{"prompt": f"prompt {i}", **LONG} for i in range(300)])
    arguments = flags(source, tmp_path / "out", "--ledger-rows", "1", "--batch-size", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "render", *arguments], stderr=subprocess.PIPE, text=True
    )
    parts = tmp_path / "out" / "metadata"
    deadline = time.monotonic() + 120
    while not (parts.exists() and len(list(parts.glob("*.parquet"))) >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 143, errors
    assert "run the same command again to resume" in errors
    done = ledger.read(Storage(str(tmp_path / "out")))
    assert set(done["status"].to_pylist()) == {"succeeded"}
    assert all((tmp_path / "out" / uri).exists() for uri in done["uri"].to_pylist())
    job = render.prepare(settings(source, tmp_path / "out"), Resources(2, 0))
    assert job.pending().num_rows == 300 - len(done)


FULL_DISK = """
mount -t tmpfs -o size=600k tmpfs "$OUT" || exit 99
"$@"; echo "exit $?"; ls "$OUT"/metadata
mount -o remount,size=64m "$OUT"
"$@"; echo "exit $?"
"""


@pytest.mark.ray
@pytest.mark.integration
def test_a_full_disk_ends_the_job_and_room_lets_it_go_on(tmp_path):
    source = write_table(tmp_path / "in.parquet", [{"prompt": f"prompt {i}", "fps": 24, **LONG} for i in range(60)])
    output = tmp_path / "out"
    output.mkdir()
    job = [sys.executable, "-m", "jobs.cli", "render", *flags(source, output, "--ledger-rows", "4")]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", *job]
    done = subprocess.run(command, env=os.environ | {"OUT": str(output)}, capture_output=True, text=True, check=True)
    first, second = done.stdout.split("exit 1\n")
    assert "rows succeeded" not in first
    assert "no room left" in done.stderr
    assert "part-" in second  # what was done before is in the ledger
    rendered = int(re.search(r"60 of 60 rows succeeded; this run took (\d+) rows", second).group(1))
    assert 0 < rendered < 60
    assert second.endswith("exit 0\n")


@pytest.mark.ray
@pytest.mark.integration
def test_shards_share_one_output(cluster, tmp_path):
    rows = [{"prompt": f"prompt {i % 6}", "note": i, **SMALL} for i in range(8)]
    rows.append({"prompt": "bad", "note": 8, "height": 100, "width": 64, "num_frames": 9})
    source = write_table(tmp_path / "in.parquet", rows)
    whole = render.prepare(settings(source, tmp_path / "out", dry_run=True), cluster)
    shards = [run(settings(source, tmp_path / "out", shard=f"{i}/2"), cluster) for i in (1, 2)]
    assert sum(rendered for _, rendered in shards) == 7
    view = ledger.read(Storage(str(tmp_path / "out")))
    assert Counter(view["id"].to_pylist()) == Counter(whole.worklist.expected_ids().to_pylist())
    assert sorted(view["note"].to_pylist()) == list(range(9))
    urls = [job.write_failed() for job, _ in shards]
    [url] = [url for url in urls if url]
    assert url.endswith(("failed-1-of-2.parquet", "failed-2-of-2.parquet"))
    assert whole.pending().num_rows == 0


@pytest.mark.ray
@pytest.mark.integration
def test_calibration_renders_real_rows_and_plans_by_them(cluster, tmp_path, capsys):
    source = write_table(tmp_path / "in.parquet", [{"prompt": f"{i}", **(LONG if i % 3 else SMALL)} for i in range(12)])
    job = render.prepare(settings(source, tmp_path / "out", batch_size=1), cluster)
    planned = render.calibrated(job, StopRequest())
    assert planned.plan.costs.measured
    assert planned.pending().num_rows == 8
    assert set(ledger.read(Storage(str(tmp_path / "out")))["status"].to_pylist()) == {"succeeded"}
    assert cli.main(["render", *flags(source, tmp_path / "out", "--dry-run")]) == 0
    printed = capsys.readouterr().out
    assert "8 rows to render, 4 in the ledger already" in printed
    assert "(measured by earlier runs)" in printed

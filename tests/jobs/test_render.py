"""The render job from its flags to its exit code; real Ray where rows are rendered."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import cli, render
from jobs.settings import RenderSettings
from pipeline import ledger
from pipeline.compact import find_orphans
from pipeline.job import StopRequest
from pipeline.plan import Resources
from pipeline.provenance import KEY, REQUEST
from pipeline.storage import Storage
from pyramid_flow import Checkpoint
from tests.pipeline.certificates import identity, manifest_of
from tests.pipeline.mp4 import probe
from tests.pipeline.tables import write_table
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


@pytest.mark.ray
@pytest.mark.integration
def test_every_row_is_in_the_ledger_once_and_every_file_is_whole(cluster, tmp_path):
    table = [{"prompt": f"prompt {i}", "note": i, **(LONG if i % 3 else SMALL)} for i in range(11)]
    table.insert(5, {"prompt": "a bad size", "note": 99, "height": 100, "width": 64, "num_frames": 9})
    source = write_table(tmp_path / "in.parquet", table)
    job, _ = run(settings(source, tmp_path / "out", sample_workers=2, batch_size=2), cluster)

    parts = [pq.read_table(path) for path in sorted((tmp_path / "out" / "metadata").iterdir())]
    rows = pa.concat_tables(parts).to_pylist()
    assert Counter(row["id"] for row in rows) == Counter(set(job.worklist.expected_ids().to_pylist()))
    assert len(rows) == 12
    assert sorted(row["note"] for row in rows) == sorted([*range(11), 99])
    [failed] = [row for row in rows if row["status"] == "failed"]
    assert (failed["note"], failed["error_message"]) == (
        99,
        "height 100 is not a multiple of 64: the nearest are 64 and 128",
    )
    assert failed["position"] == f"file://{source}:5"
    for row in rows:
        if row is not failed:
            video = tmp_path / "out" / row["uri"]
            assert hashlib.sha256(video.read_bytes()).hexdigest() == row["sha256"]
            info = probe(video)
            assert (info.height, info.width, info.frames) == (row["height"], row["width"], row["num_frames"])
            assert row["batch_size"] in (1, 2)
    assert len({row["sha256"] for row in rows if row is not failed}) == 11
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 11
    assert json.loads((tmp_path / "out" / "runs" / f"{job.run}.json").read_text())["state"] == "finished"
    job.write_gallery()
    assert (tmp_path / "out" / "gallery.png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.ray
@pytest.mark.integration
def test_stills_and_videos_of_one_table_share_job_and_ledger(cluster, tmp_path, capsys):
    still, fixed = {**SMALL, "num_frames": 1}, {"prompt": "a fox", "seed": 1}
    table = [
        {"id": "video", **fixed, **SMALL},
        {"id": "still", **fixed, **still},
        {"id": "webp", **fixed, **still, "image_format": "webp", "guidance_decay": 0.5},
    ]
    source = write_table(tmp_path / "in.parquet", table)
    job, _ = run(settings(source, tmp_path / "out"), cluster)
    rows = {row["id"]: row for row in job.view().to_pylist()}
    assert {name: row["media_type"] for name, row in rows.items()} == {
        "video": "video/mp4",
        "still": "image/png",
        "webp": "image/webp",
    }
    for row in rows.values():
        assert hashlib.sha256((tmp_path / "out" / row["uri"]).read_bytes()).hexdigest() == row["sha256"]
    assert (rows["video"]["image_format"], rows["webp"]["guidance_decay"]) == (None, 0.5)
    assert rows["still"]["latents_sha256"] == rows["webp"]["latents_sha256"]
    assert find_orphans(job.storage) == []
    job.write_gallery()
    assert cli.main(["render", *flags(source, tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 rows succeeded; this run took 0 rows" in printed
    assert f"images   file://{tmp_path}/out/images" in printed
    assert f"videos   file://{tmp_path}/out/videos" in printed


@pytest.mark.ray
@pytest.mark.integration
def test_adapters_change_the_videos_and_are_told_in_the_ledger(cluster, tmp_path):
    adapter = save_adapter(Checkpoint.open("toy").load_transformer(torch.float32, "cpu"), tmp_path / "style", seed=1)
    source = write_table(tmp_path / "in.parquet", [{"prompt": "a red circle", "seed": 3, **SMALL}])
    hashes = set()
    for lora, name in (([], "toy"), ([str(adapter)], "toy + style=1"), ([f"{adapter}=-1"], "toy + style=-1")):
        job, _ = run(settings(source, tmp_path / name, lora=lora), cluster)
        [row] = ledger.read(job.storage).to_pylist()
        assert (row["status"], row["model"]) == ("succeeded", name)
        hashes.add(row["latents_sha256"])
    assert len(hashes) == 3


def test_other_adapters_into_the_same_output_are_refused(tmp_path, caplog):
    adapter = save_adapter(Checkpoint.open("toy").load_transformer(torch.float32, "cpu"), tmp_path / "style", seed=1)
    source = write_table(tmp_path / "in.parquet", [{"prompt": "a red circle", **SMALL}])
    render.prepare(settings(source, tmp_path / "out", lora=[str(adapter)]), Resources(2, 0))
    assert cli.main(["render", *flags(source, tmp_path / "out", "--lora", f"{adapter}=0.5")]) == 2
    assert "model_fingerprint" in caplog.text


@pytest.mark.ray
@pytest.mark.integration
def test_a_second_run_renders_only_what_is_missing(cluster, tmp_path):
    rows = [{"prompt": f"prompt {i}", **SMALL} for i in range(3)]
    write_table(tmp_path / "in.parquet", rows[:2])
    _, rendered = run(settings(tmp_path / "in.parquet", tmp_path / "out"), cluster)
    assert rendered == 2
    write_table(tmp_path / "in.parquet", [*rows, {"prompt": "", **SMALL}])
    job, rendered = run(settings(tmp_path / "in.parquet", tmp_path / "out"), cluster)
    assert rendered == 2  # the new row and the bad one
    assert Counter(job.view()["status"].to_pylist()) == {"succeeded": 3, "failed": 1}
    _, rendered = run(settings(tmp_path / "in.parquet", tmp_path / "out"), cluster)
    assert rendered == 0
    _, rendered = run(settings(tmp_path / "in.parquet", tmp_path / "out", retry_failed=True), cluster)
    assert rendered == 1


@pytest.mark.ray
@pytest.mark.integration
def test_duplicates_copies_and_disputed_ids_get_their_own_rows(cluster, tmp_path):
    table = [
        {"prompt": "twice", "note": "first", **SMALL},
        {"prompt": "twice", "note": "second", **SMALL},
        {"id": "mine", "prompt": "one thing", "note": "a", **SMALL},
        {"id": "mine", "prompt": "another thing", "note": "b", **SMALL},
        {"id": "copies", "prompt": "many", "note": "c", "num_videos_per_prompt": 2, "seed": 5, **SMALL},
    ]
    source = write_table(tmp_path / "in.parquet", table)
    job, _ = run(settings(source, tmp_path / "out"), cluster)
    rows = {row["id"]: row for row in job.view().to_pylist()}
    assert len(rows) == 6
    [original] = [row for row in rows.values() if row["note"] == "first"]
    [duplicate] = [row for row in rows.values() if row["note"] == "second"]
    assert duplicate["id"] == f"{original['id']}-dup1"
    assert duplicate["duplicate_of"] == original["id"]
    assert (duplicate["uri"], duplicate["status"]) == (original["uri"], "succeeded")
    for name in ("mine", "mine-dup1"):
        assert rows[name]["status"] == "failed"
        assert f"{source}:2" in rows[name]["error_message"]
        assert f"{source}:3" in rows[name]["error_message"]
    assert [rows[f"copies-{i}"]["seed"] for i in range(2)] == [5, 6]
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 3


@pytest.mark.ray
@pytest.mark.integration
def test_latents_do_not_depend_on_workers_or_batches(cluster, tmp_path):
    source = write_table(tmp_path / "in.parquet", [{"prompt": f"prompt {i}", **LONG} for i in range(3)])
    half = replace(cluster, cpus=cluster.cpus // 2)  # as many threads per worker: they decide how sums are split
    alone, _ = run(settings(source, tmp_path / "a", batch_size=1), half)
    again, _ = run(settings(source, tmp_path / "b", batch_size=1, sample_workers=2), cluster)
    hashes = [
        dict(zip(*(job.view()[c].to_pylist() for c in ("id", "latents_sha256")), strict=True)) for job in (alone, again)
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.ray
@pytest.mark.integration
def test_workers_of_two_processes_render_what_one_does(cluster, tmp_path):
    source = write_table(tmp_path / "in.parquet", [{"prompt": f"prompt {i}", **LONG} for i in range(2)])
    jobs = [run(settings(source, tmp_path / str(n), gpus_per_clip=n), cluster)[0] for n in (1, 2)]
    alone, together = (job.view().select(["id", "seed", "status"]).to_pylist() for job in jobs)
    assert alone == together
    assert {row["status"] for row in together} == {"succeeded"}


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
    ledger.claim(Storage(str(tmp_path / "out")), {}, {"model_fingerprint": "other"})
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
    ledger.claim(Storage(str(tmp_path / "out")), {}, pixels)
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
def test_an_interrupted_job_keeps_what_is_done_and_resumes(cluster, tmp_path):
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
    job = render.prepare(settings(source, tmp_path / "out"), cluster)
    assert job.pending().num_rows == 300 - len(done)


FULL_DISK = """
mount -t tmpfs -o size=600k tmpfs "$OUT" || exit 99
"$@"; echo "exit $?"; ls "$OUT"/metadata
mount -o remount,size=64m "$OUT"
"$@"; echo "exit $?"
"""


@pytest.mark.integration
@pytest.mark.ray
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

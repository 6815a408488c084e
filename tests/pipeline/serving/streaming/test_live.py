"""Videos are seen while they are made: units become fragments early, whatever happens to the decoder and the job."""

import io
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.rows import Item, RenderRow
from pipeline.serving.http.files import fragment_path, fragments_folder, remove_files
from pipeline.serving.queue.records import Status
from pipeline.serving.streaming import live
from pipeline.serving.streaming.progress import BEFORE, SAMPLING
from pyramid_flow.toy.world import draw_scene
from tests.pipeline.mp4 import probe, read_frames, read_tags
from tests.pipeline.serving.farm import Farm

UNGUIDED = {"guidance_scale": 0, "video_guidance_scale": 0}
THREE_UNITS, FOUR_UNITS = {"num_frames": 17} | UNGUIDED, {"num_frames": 25} | UNGUIDED


@pytest.fixture
def farm(rendering_farm) -> Farm:
    return rendering_farm


def local(farm, uri: str) -> str:
    return farm.storage.url(uri).removeprefix("file://")


def fragments(farm, video_id: str) -> bytes:
    job = farm.job(video_id)
    return b"".join(farm.storage.get(fragment_path(job.claim, index)) for index in range(job.fragments))


def follow(farm, video_id: str) -> str:
    farm.store.follow(video_id, "me")
    return video_id


def test_a_followed_video_can_be_seen_before_it_is_finished(farm, tmp_path, monkeypatch):
    video_id = follow(farm, farm.ask("followed", seed=1, **THREE_UNITS))
    other = farm.ask("not followed", seed=1, **THREE_UNITS)
    show, seen = farm.local.decode.show, []

    def shown(item, start):
        unit = show(item, start)
        job = farm.job(video_id)
        seen.append((job.fragments, job.progress < BEFORE + SAMPLING))
        return unit

    monkeypatch.setattr(farm.local.decode, "show", shown)
    farm.run_all()
    assert seen == [(1, True), (2, True)]
    stream = tmp_path / "stream.mp4"
    stream.write_bytes(fragments(farm, video_id))
    file = local(farm, farm.job(video_id).result["uri"])
    assert probe(stream).frames == 17
    np.testing.assert_array_equal(read_frames(file), read_frames(stream))
    assert read_tags(file)["prompt"] == "followed"
    assert farm.job(other).fragments == 0
    assert farm.storage.list(fragments_folder(other)) == []


def test_following_changes_no_picture_by_more_than_its_compression(farm):
    ids = [farm.ask("a large red circle moves left", seed=1, **THREE_UNITS) for _ in range(2)]
    follow(farm, ids[0])
    farm.run_all()
    one, other = (read_frames(local(farm, farm.job(video_id).result["uri"])).astype(int) for video_id in ids)
    assert np.abs(one - other).mean() < 2
    strips = [farm.storage.get(farm.job(video_id).result["thumbnail_uri"]) for video_id in ids]
    assert strips[0] == strips[1]


def test_the_given_picture_is_the_first_that_is_seen(farm, tmp_path):
    scene = draw_scene(Random(0), ("large",))
    [given], picture = scene.render(1, 64), io.BytesIO()
    Image.fromarray(given).save(picture, "PNG")
    video_id = follow(farm, farm.ask(scene.caption, picture.getvalue(), num_frames=17))
    farm.run_all()
    first = tmp_path / "first.mp4"
    first.write_bytes(farm.storage.get(fragment_path(farm.job(video_id).claim, 0)))
    [frame] = read_frames(first)
    assert np.abs(frame.astype(int) - given).mean() < 8
    assert farm.job(video_id).fragments == 3


def test_a_decoder_that_lost_what_it_had_decodes_it_again(farm, monkeypatch):
    video_id = follow(farm, farm.ask("lost", **FOUR_UNITS))
    show, starts = farm.local.decode.show, []

    def forgetful(item, start):
        starts.append(start)
        if len(starts) == 3:
            farm.local.decode.videos.clear()
        return show(item, start)

    monkeypatch.setattr(farm.local.decode, "show", forgetful)
    farm.run_all()
    assert starts[0] == 0 < starts[2]
    assert starts[3] == 0
    job = farm.job(video_id)
    assert (job.status, job.fragments) == (Status.COMPLETED, 4)
    assert probe(local(farm, job.result["uri"])).frames == 25


def test_a_video_that_another_decoder_had_meanwhile_is_decoded_again(farm, monkeypatch):
    video_id = follow(farm, farm.ask("elsewhere and back", seed=1, **FOUR_UNITS))
    plain = farm.ask("elsewhere and back", seed=1, **FOUR_UNITS)
    show, starts = farm.local.decode.show, []

    def sometimes_elsewhere(item, start):
        starts.append(start)
        if len(starts) == 2:  # as a decoder that has all units from the first one on
            return start + item.tensors["latents"].shape[2]
        return show(item, start)

    monkeypatch.setattr(farm.local.decode, "show", sometimes_elsewhere)
    farm.run_all()
    assert starts[:2] == [0, 1]
    assert 0 in starts[2:]
    seen, whole = (read_frames(local(farm, farm.job(each).result["uri"])) for each in (video_id, plain))
    assert len(seen) == 25
    assert np.abs(seen.astype(int) - whole).mean() < 5


@pytest.mark.parametrize("fails_at", [1, 3])
def test_what_cannot_be_shown_is_made_all_the_same(farm, monkeypatch, fails_at):
    encode, calls = live.encode_fragment, []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= fails_at:
            raise OSError("no more processes")
        return encode(*arguments, **options)

    monkeypatch.setattr(live, "encode_fragment", failing)
    video_id = follow(farm, farm.ask("dark", **THREE_UNITS))
    farm.run_all()
    assert farm.job(video_id).status == Status.COMPLETED
    assert probe(local(farm, farm.job(video_id).result["uri"])).frames == 17
    assert not farm.local.decode.videos


def test_who_comes_late_is_shown_all_of_it(farm):
    video_id = farm.ask("late", **THREE_UNITS)
    decode = farm.local.decode.process

    def followed(items):
        follow(farm, video_id)
        return decode(items)

    farm.local.decode.process = followed
    farm.run_all()
    assert farm.job(video_id).fragments == 3


@pytest.mark.parametrize("is_deleted", [True, False])
def test_nothing_is_left_of_a_video_that_goes_while_it_is_shown(farm, monkeypatch, is_deleted):
    video_id = follow(farm, farm.ask("unwanted", **THREE_UNITS))
    store, encode = farm.store, live.encode_fragment

    def too_late(*arguments, **options):
        job = store.cancel(video_id, "me")
        if is_deleted and job:
            remove_files(farm.storage, job)
            store.delete(video_id, "me")
        return encode(*arguments, **options)

    monkeypatch.setattr(live, "encode_fragment", too_late)
    farm.run_all()
    if not is_deleted:
        remove_files(farm.storage, farm.job(video_id))
    assert farm.storage.list("stream") == farm.storage.list("videos") == []


def test_a_decoder_keeps_no_more_videos_than_it_may(farm, monkeypatch):
    monkeypatch.setattr(farm.local.decode, "max_live", 1)
    ids = [follow(farm, farm.ask("one of many", seed=seed, **THREE_UNITS)) for seed in range(2)]
    farm.run_all()
    assert [farm.job(video_id).fragments for video_id in ids] == [3, 3]
    assert [farm.job(video_id).status for video_id in ids] == [Status.COMPLETED] * 2


def test_units_that_are_finished_while_others_are_shown_go_together():
    waiting, shown = [], []

    class Later:
        def submit(self, call, *arguments):
            waiting.append((call, arguments))

    def show(item, start):
        shown.append((start, item.tensors["latents"].flatten().tolist()))
        return start + item.tensors["latents"].shape[2]

    relay, item = live.Relay(show, Later()), Item(RenderRow(id="a-1", position="a"))
    for number in range(3):
        relay(item, [torch.full((1, 1, 1, 1, 1), float(number))])
        if number == 1:
            for call, arguments in waiting:
                call(*arguments)
            waiting.clear()
    [(call, arguments)] = waiting
    call(*arguments)
    assert shown == [(0, [0.0, 1.0]), (2, [2.0])]

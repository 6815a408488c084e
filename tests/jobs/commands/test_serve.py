"""`pyramid-render serve`: what is refused before anything starts, and the config file that it prints."""

import importlib
from types import ModuleType

import pytest
import yaml

from jobs import cli
from jobs.settings import ServeSettings
from pipeline.serving.http.keys import hashed


@pytest.fixture
def serve() -> ModuleType:
    """Import the command's module here, so that collecting does not load Ray Serve."""
    return importlib.import_module("jobs.commands.serve")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "nowhere"], "no checkpoint folder"),
        (["--host", "0.0.0.0"], "API keys are needed"),
        (["--host", "0.0.0.0", "--no-auth"], "127.0.0.1 only"),
        (["--keys-file", "nowhere"], "cannot be read"),
        (["--api-keys", "me:short"], "not NAME:SHA256"),
        (["--database", "mysql://a/b"], "sqlite:///FILE or postgresql://"),
        (["--database", "postgresql//me:secret@db"], "sqlite:///FILE or postgresql://"),
        (["--redirect-downloads"], "cannot sign URLs"),
        (["--webhook-url", "ftp://example.com"], "no http(s) URL"),
        (["--webhook-url", "https://example.com/hook"], "PYRAMID_RENDER_WEBHOOK_SECRET"),
        (["--webhook-url", "http://[::1"], "is no URL"),
        (["--output", "nothing://bucket/out"], "cannot use nothing://bucket/out"),
        (["--output", "s3://bucket/out"], "say where the --database is"),
        (["--port", "99999"], "less than or equal to 65535"),
        (["--memory", "some"], "'auto', 'full', 'offload' or 'sequential'"),
        (["--gpus-per-clip", "5"], "possible are 1, 2, 3, 4, 6, 12"),
        (["--place", "paint:zone=a"], "with a stage of encode, sample, decode, publish"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, flags, reason, caplog, capsys):
    try:
        code = cli.main(["serve", "--output", str(tmp_path / "out"), *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2
    printed = caplog.text + capsys.readouterr().err
    assert reason in printed
    assert "secret" not in printed.replace("PYRAMID_RENDER_WEBHOOK_SECRET", "")


def test_a_new_key_comes_with_its_line(capsys):
    assert cli.main(["serve", "--new-key", "me"]) == 0
    key, line = capsys.readouterr().out.split()
    assert line == f"me:{hashed(key)}"


def test_the_printed_config_is_one_of_serves(tmp_path, capsys):
    from ray.serve.schema import ServeDeploySchema  # here, so that collecting does not load Ray Serve

    flags = ["--api-keys", f"me:{'a' * 64}", "--memory", "offload", "--tile", "none"]
    flags += ["--gpus-per-clip", "4", "--device", "cuda", "--place", "sample:pool=gpu"]
    assert cli.main(["serve", "--output", str(tmp_path), "--print-config", *flags]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    [api] = ServeDeploySchema.model_validate(values).applications
    assert api.args["keys"] == {"a" * 64: "me"}
    assert (api.args["memory"], api.args["tile"]) == ("offload", None)
    assert (api.args["gpus_per_clip"], api.args["gpus"]["sample"], api.args["gpus"]["encode"]) == (4, 4, 0.1)
    assert api.args["places"] == {"sample": {"pool": "gpu"}}
    assert (api.import_path, api.route_prefix) == ("jobs.commands.serve:application", "/")


def test_without_keys_the_printed_config_is_for_this_machine(tmp_path, capsys):
    assert cli.main(["serve", "--output", str(tmp_path), "--print-config"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    [api] = values["applications"]
    assert (api["args"]["keys"], api["args"]["allow_anonymous"], api["args"]["host"]) == (None, True, "127.0.0.1")
    assert values["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("database", "printed"),
    [
        ("postgresql://me:hunter2@db:5432/videos?sslmode=require", "postgresql://me@db:5432/videos?sslmode=require"),
        ("postgresql://me@db/videos?password=hunter2", "postgresql://me@db/videos"),
        ("postgresql://me@db/videos?sslpassword=hunter2", "postgresql://me@db/videos"),
        ("postgresql://me@db/videos", "postgresql://me@db/videos"),
        ("sqlite:////data/videos.db", "sqlite:////data/videos.db"),
    ],
)
def test_the_printed_config_holds_no_password(serve, database, printed, caplog):
    settings = ServeSettings(database=database)
    config = serve.ServiceConfig(database=database, output="out", keys={})
    text = serve.config_file(settings, config)
    assert "hunter2" not in text + caplog.text
    assert yaml.safe_load(text)["applications"][0]["args"]["database"] == printed
    assert ("PGPASSWORD" in caplog.text) is (database != printed)


def test_without_keys_a_service_is_not_deployed_on_all_interfaces(serve, monkeypatch):
    config = serve.ServiceConfig(database="sqlite:///a.db", output="out", allow_anonymous=True, host="127.0.0.1")
    monkeypatch.setattr("ray.nodes", lambda: [])
    monkeypatch.setattr(serve, "_listening_host", lambda: "0.0.0.0")
    with pytest.raises(serve.ServeError, match=r"Serve listens on 0\.0\.0\.0: without keys"):
        serve.application(config)

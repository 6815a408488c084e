"""`pyramid-render serve`: what is refused before anything starts, and the config file that it prints."""

import pytest
import yaml

from jobs import cli
from pipeline.serving.keys import hashed


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "nowhere"], "no checkpoint folder"),
        (["--host", "0.0.0.0"], "API keys are needed"),
        (["--host", "0.0.0.0", "--no-auth"], "127.0.0.1 only"),
        (["--keys-file", "nowhere"], "cannot be read"),
        (["--api-keys", "me:short"], "not NAME:SHA256"),
        (["--database", "mysql://a/b"], "sqlite:///FILE or postgresql://"),
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
    assert reason in caplog.text + capsys.readouterr().err


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
    api, page = ServeDeploySchema.model_validate(values).applications
    assert api.args["keys"] == {"a" * 64: "me"}
    assert (api.args["memory"], api.args["tile"]) == ("offload", None)
    assert (api.args["gpus_per_clip"], api.args["gpus"]["sample"], api.args["gpus"]["encode"]) == (4, 4, 0.1)
    assert api.args["places"] == {"sample": {"pool": "gpu"}}
    assert (api.import_path, api.route_prefix) == ("jobs.serve:application", "/")
    assert (page.import_path, page.route_prefix) == ("pipeline.serving.app:build_page", "/page")
    assert page.args == {"api_url": "http://127.0.0.1:8000", "asks_keys": True}


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:9000"),
        ("::", "http://[::1]:9000"),
        ("10.1.2.3", "http://10.1.2.3:9000"),
    ],
)
def test_the_page_calls_the_api_on_its_own_machine(tmp_path, capsys, host, url):
    flags = ["--print-config", "--host", host, "--port", "9000", "--api-keys", f"me:{'a' * 64}"]
    assert cli.main(["serve", "--output", str(tmp_path), *flags]) == 0
    _, page = yaml.safe_load(capsys.readouterr().out)["applications"]
    assert page["args"]["api_url"] == url

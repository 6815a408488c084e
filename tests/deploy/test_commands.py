"""Commands in manifests and in docs/deploy are ones that the programs take, and no file holds a secret."""

import re
from importlib import import_module

import click
import pytest
from ray.scripts.scripts import cli as ray_cli

from jobs.cli import COMMANDS
from jobs.settings import parse
from jobs.settings.base import JobSettings
from tests.deploy.manifests import DEPLOY, ROOT, SHIPPED, commands

TEXTS = [path for path in SHIPPED if path.suffix in (".yaml", ".md", "")]
SECRETS = {
    "a key of AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"PRIVATE KEY-----",
    "a token": r"\b(hf|ghp|glpat|xox[bp]|pr)[-_][A-Za-z0-9_-]{20,}",
    "a hash or key in hex": r"\b[0-9a-f]{32,}\b",
    "a password in a URL": r"://[^/\s:@]+:[^/\s@$]+@",
    "a value for a secret": r"(?i)(secret|password|token|_key)[a-z_]*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}",
}


def check_ours(arguments: list[str]) -> None:
    """Parse a call of `pyramid-render`; raises SystemExit if it is wrong."""
    name, *flags = arguments
    module = import_module(COMMANDS[name][0])
    [settings] = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, JobSettings)]
    parse(settings, flags)


def check_rays(arguments: list[str]) -> None:
    """Parse a call of `ray`; raises click.UsageError if it is wrong."""
    command: click.Command = ray_cli
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.get_command(click.Context(command), name) or pytest.fail(f"ray has no command {name}")
    command.parse_args(click.Context(command, info_name=name), arguments)


def calls(program: str) -> list[tuple[str, list[str]]]:
    return [(path.name, call) for path in TEXTS for call in commands(path, program)]


@pytest.mark.parametrize(("where", "call"), calls("pyramid-render"), ids=lambda value: str(value)[:60])
def test_our_commands_parse(where, call):
    check_ours(call)


@pytest.mark.parametrize(("where", "call"), calls("ray"), ids=lambda value: str(value)[:60])
def test_rays_commands_parse(where, call, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_rays(call)


def test_there_are_commands_to_check():
    ours = {call[0] for _, call in calls("pyramid-render")}
    rays = {call[0] for _, call in calls("ray")}
    assert {"render", "serve", "status"} <= ours
    assert {"up", "down", "job", "start", "stop", "dashboard", "get-auth-token"} <= rays
    assert "rayjob.yaml" in {where for where, _ in calls("pyramid-render")}


@pytest.mark.parametrize("call", ["render --inputs a --output b --model toy", "serve --port x", "render --input a"])
def test_a_wrong_command_of_ours_is_found(call):
    with pytest.raises(SystemExit):
        check_ours(call.split())


@pytest.mark.parametrize("call", ["up cluster.yaml --no", "job submit --adress x -- ls", "down"])
def test_a_wrong_command_of_rays_is_found(call):
    with pytest.raises(click.UsageError):
        check_rays(call.split())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path):
    assert found(path.read_text()) == []


def found(text: str) -> list[str]:
    return [what for what, pattern in SECRETS.items() if re.search(pattern, text)]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("id: AKIA" + "A" * 16, "a key of AWS"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("HF: hf_" + "a1" * 12, "a token"),
        ("keys: {" + "0af1" * 16 + ": me}", "a hash or key in hex"),
        ("postgresql://user:word@db/videos", "a password in a URL"),
        ("AWS_SECRET_ACCESS_KEY=" + "aB3/" * 10, "a value for a secret"),
        ('{name: PGPASSWORD, value: x, "password": "correcthorse1"}', "a value for a secret"),
    ],
)
def test_a_secret_is_found(text, what):
    assert what in found(text)


def test_every_file_is_explained():
    page = (DEPLOY / "README.md").read_text()
    files = [path for path in SHIPPED if path.name != "README.md"]
    assert [path.name for path in files if path.name not in page] == []


def test_every_link_leads_somewhere():
    for page in (DEPLOY / "README.md", ROOT / "README.md", ROOT / "docs/operations.md"):
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_what_is_yours_is_marked():
    """The lines that everyone must change, and no others, hold names that are nobody's."""
    nobodys = re.compile(r"registry\.example\.com|my-bucket|my-project|@postgres/")
    for path in (one for one in SHIPPED if one.suffix == ".yaml"):
        for line in path.read_text().splitlines():
            if nobodys.search(line) and not line.lstrip().startswith("pyramid-render render"):
                assert "# CHANGE" in line, f"{path.name}: {line}"

"""Commands in manifests and in docs/deploy parse, links resolve, and no file holds a secret."""

import re

import click
import pytest
from ray.scripts.scripts import cli as ray_cli

from jobs.cli import COMMANDS, Group
from jobs.settings import parse
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
    command = COMMANDS[name]
    if isinstance(command, Group):
        command, flags = command.commands[flags[0]], flags[1:]
    parse(command.settings, flags)


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


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.suffix != ".lock"], ids=lambda path: path.name)
def test_no_file_holds_a_secret(path):
    assert found(path.read_text()) == []


def found(text: str) -> list[str]:
    return [what for what, pattern in SECRETS.items() if re.search(pattern, text)]


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

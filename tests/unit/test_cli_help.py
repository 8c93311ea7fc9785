"""What `--help` says holds: summaries fit their line, examples can be typed, and every command has its --json."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cli_harness
import pytest
import standin
from cli_harness import TimedGateway
from click import Command, Context, Group
from click.testing import CliRunner, Result

from engine import registry
from engine.backends import open_store
from enginehouse.cli import main
from enginehouse.command_line import SECTIONS
from enginehouse.examples import EXAMPLES
from enginehouse.home import Home

TALKS = {"chat", "completion"}  # with a person, and with a shell


def leaves(command: Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Command]]:
    """Every command that does something: `models` is a group that does."""
    if not isinstance(command, Group) or command.invoke_without_command:
        yield " ".join(path), command
    if isinstance(command, Group):
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))


LEAVES = dict(leaves(main))


def groups() -> list[tuple[str, Command]]:
    return [*LEAVES.items(), *((name, main.commands[name]) for name in ("builds", "engines", "keys")), ("", main)]


# --- help


@pytest.mark.parametrize(("path", "command"), groups(), ids=[path or "enginehouse" for path, _ in groups()])
def test_help_has_a_summary_of_one_line_and_examples(path: str, command: Command) -> None:
    if path:
        assert not command.get_short_help_str(62).endswith("..."), command.get_short_help_str(200)
    if not isinstance(command, Group) or command.invoke_without_command or not path:
        assert EXAMPLES.get(path), f"{path} has no example in enginehouse/examples.py"
        text = CliRunner().invoke(main, [*path.split(), "--help"]).stdout
        assert all(line in text for line in EXAMPLES[path])


def test_every_example_is_of_a_command() -> None:
    assert set(EXAMPLES) <= {path for path, _ in groups()}


def commands() -> list[str]:
    lines = {line.partition("  #")[0].strip(): path for path, lines in EXAMPLES.items() for line in lines}
    found = [line for line in lines if line.startswith("enginehouse ")]
    found += re.findall(r"\$\((enginehouse [^)]*)\)", "\n".join(lines))
    assert len(found) == sum(not line.startswith("#") for line in lines)  # each one of them is tried
    return found


@pytest.mark.parametrize("line", commands())
def test_every_example_can_be_typed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed as click does it, not run."""
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(line)
    words = words[: next((at for at, word in enumerate(words) if word in ("<", ">")), len(words))]
    assert program == "enginehouse"
    command: Command = main
    context = Context(main)
    name = program
    while isinstance(command, Group) and words and not words[0].startswith("-"):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, name
        command = found
    command.make_context(name, list(words), parent=context)


def test_the_main_help_shows_every_command_once() -> None:
    shown = [name for names in SECTIONS.values() for name in names]
    assert sorted(shown) == sorted(main.commands)
    text = CliRunner().invoke(main, ["--help"]).stdout
    for section in SECTIONS:
        assert f"\n{section}:\n" in text


@pytest.mark.parametrize("line", ["plan --gpu list", *(f"completion {shell}" for shell in ("bash", "zsh", "fish"))])
def test_examples_that_need_nothing_run(line: str) -> None:
    assert any(f"enginehouse {line}" in example for lines in EXAMPLES.values() for example in lines)
    assert CliRunner().invoke(main, line.split()).exit_code == 0


# --- JSON


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TimedGateway]:
    """All services, with a store that has the names demo, given twice, other and spare."""
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "home"))
    store = open_store(Home(tmp_path / "home").store)
    first = standin.publish(store, "demo")
    registry.set_name(store, "demo", standin.publish(store, "other"))
    registry.set_name(store, "spare", first)
    with cli_harness.serving(store) as (address, served):
        monkeypatch.setenv("ENGINEHOUSE_GATEWAY", address)
        monkeypatch.setenv("ENGINEHOUSE_BUILDER", address)
        yield served


def typed(line: str) -> Result:
    return CliRunner().invoke(main, shlex.split(line))


DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
JSON = {
    "up": None,  # its own test, below
    "load": "load $ENGINE --executor $ADDRESS",
    "unload": "unload $ENGINE --executor $ADDRESS",
    "build": "build here --name new",
    "quantize": "quantize $DEMO --output made --quant W8A16",
    "builds ls": "builds ls",
    "builds logs": "builds logs build-1",
    "builds cancel": "builds cancel build-1",
    "plan": "plan --gpu list",
    "generate": "generate x --model demo",
    "bench": "bench --model demo --requests 2 --input-len 9 --output-len 2 --warmup 0",
    "models": "models",
    "models set": "models set new demo",
    "models history": "models history demo",
    "models rollback": "models rollback demo",
    "models rename": "models rename demo new",
    "models rm": "models rm spare",
    "engines ls": "engines ls",
    "engines inspect": "engines inspect demo",
    "engines verify": "engines verify demo",
    "engines rm": "engines rm $ENGINE",
    "engines sign": "engines sign demo --key $KEY",
    "engines gc": "engines gc",
    "keys generate": "keys generate $NEW",
    "keys show": "keys show $KEY",
    "keys add": "keys add api-keys.json acme",
    "keys ls": "keys ls $API_KEYS",
    "keys revoke": "keys revoke $API_KEYS $API_ID",
    "certs": "certs new-certs",
}
LISTS = {"builds ls", "plan", "models", "models history", "engines ls", "keys show"}  # an array; the others are objects


def test_unload_says_which_engine_it_means(gateway: TimedGateway, tmp_path: Path) -> None:
    store = open_store(Home(tmp_path / "home").store)
    engines = sorted(standin.publish(store, f"model-{number}") for number in range(17))  # two begin with the same digit
    address = os.environ["ENGINEHOUSE_GATEWAY"]
    assert "name executors with --executor" in typed("unload x").stderr
    at = f"--executor {address}"
    assert f"executor {address} has no engine 'x' loaded; it has: none" in typed(f"unload x {at}").stderr
    for engine in engines:
        assert typed(f"load {engine} {at}").exit_code == 0
    shared = next(a[0] for a, b in pairwise(engines) if a[0] == b[0])
    assert "engines: give more digits" in typed(f"unload {shared} {at}").stderr
    assert f"{engines[3][:12]}: unloaded by 1 executor" in typed(f"unload {engines[3][:10]} {at} --drain 5s").stderr
    assert "has no engine" in typed(f"unload {engines[3]} {at}").stderr


def test_every_command_is_in_the_table() -> None:
    assert set(JSON) == set(LEAVES) - TALKS


@pytest.mark.parametrize("path", [path for path, line in JSON.items() if line])
def test_json_of_every_command(
    path: str, gateway: TimedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document on stdout, or an object a line of what goes on; names are snake_case."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    store = open_store(Home(tmp_path / "home").store)
    key = tmp_path / "my.key"
    assert typed(f"keys generate {key}").exit_code == 0
    assert typed("build here --name built").exit_code == 0  # job build-1, by the builder
    engine = registry.resolve(store, "spare").engine_id
    keys = tmp_path / "keys.json"
    api_key = json.loads(typed(f"keys add {keys} acme --json").stdout)["id"]
    if path == "unload":
        assert typed(f"load {engine} --executor {os.environ['ENGINEHOUSE_GATEWAY']}").exit_code == 0
    if path == "engines rm":
        for name in ("spare", "demo", "other", "built"):
            assert typed(f"models rm {name}").exit_code == 0
    line = JSON[path] or ""
    named = {
        "$ENGINE": engine,
        "$KEY": key,
        "$NEW": tmp_path / "new.key",
        "$API_KEYS": keys,
        "$API_ID": api_key,
        "$DEMO": DEMO,
    }
    for name, value in named.items():
        line = line.replace(name, str(value))
    result = CliRunner().invoke(
        main, shlex.split(line.replace("$ADDRESS", os.environ["ENGINEHOUSE_GATEWAY"])) + ["--json"]
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    if path == "builds logs":
        told: Any = [json.loads(one) for one in result.stdout.splitlines()]
        assert told[0]["phase"] == "weights" and told[-1]["state"] == "succeeded"
    else:
        told = json.loads(result.stdout)
        assert isinstance(told, list if path in LISTS else dict)
    assert told
    for one in told if isinstance(told, list) else [told]:
        assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in one), one


@pytest.mark.parametrize("path", JSON)
def test_errors_are_json_too(path: str) -> None:
    """Of what was typed wrong, status 2; the last line on stderr."""
    result = typed(f"{path} --no-such-option --json")
    assert (result.exit_code, result.stdout) == (2, "")
    told = json.loads(result.stderr.splitlines()[-1])["error"]
    assert set(told) == {"code", "reason", "message", "metadata", "retry_after"}
    assert (told["code"], told["reason"]) == ("INVALID_ARGUMENT", "USAGE")
    assert "--no-such-option" in told["message"]
    assert typed(f"{path} --no-such-option").stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("models history nope", "NOT_FOUND", "MODEL_NOT_FOUND"),
        ("models set a/b demo", "INVALID_ARGUMENT", "MODEL_NAME_INVALID"),
        ("generate x --model demo --gateway 127.0.0.1:1", "UNAVAILABLE", "NOT_REACHABLE"),
        ("bench --gateway 127.0.0.1:1", "UNAVAILABLE", "NOT_REACHABLE"),
        ("keys generate /no/such/folder/key", "UNKNOWN", "OS_ERROR"),
        ("build broken", "INVALID_ARGUMENT", "CONFIG_INVALID"),
    ],
)
def test_errors_of_commands(line: str, code: str, reason: str, gateway: TimedGateway) -> None:
    result = typed(f"{line} --json")
    assert (result.exit_code, result.stdout) == (1, "")
    told = json.loads(result.stderr.splitlines()[-1])["error"]
    assert (told["code"], told["reason"]) == (code, reason)
    assert typed(line).stderr.splitlines()[-1] == f"error: {told['message']}"


def test_json_before_a_subcommand_counts_for_its_errors(gateway: TimedGateway) -> None:
    assert json.loads(typed("models --json history nope").stderr)["error"]["reason"] == "MODEL_NOT_FOUND"


def test_json_of_up_excludes_a_command(gateway: TimedGateway) -> None:
    result = typed("up demo --json -- echo x")
    assert result.exit_code == 2 and "stdout is the command's" in json.loads(result.stderr)["error"]["message"]
    plain = typed("up demo --executors 0 -- echo --json")  # the command's own --json is not ours
    assert plain.exit_code == 2 and plain.stderr.startswith("Usage: ")

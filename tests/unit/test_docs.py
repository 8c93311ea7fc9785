"""What the documents name exists: files, functions, commands and their options."""

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click import Context, Group

from enginehouse.cli import main
from tests import documents

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()
PACKAGES = ("protos", "engine", "builder_svc", "executor_svc", "gateway", "enginehouse")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
CODE = "\n".join(path.read_text() for path in SOURCES) + "".join(
    path.read_text() for path in ROOT.glob("protos/v1/*.proto")
)


def test_every_file_that_the_architecture_names_exists() -> None:
    known = {str(path.relative_to(ROOT)) for path in (*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/*.py"))}
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", ARCHITECTURE))
    assert len(named) > 25
    assert [name for name in named if not any(path == name or path.endswith(f"/{name}") for path in known)] == []


def test_every_name_in_the_life_of_a_build_and_of_a_request_is_in_the_code() -> None:
    lives = ARCHITECTURE[ARCHITECTURE.index("## The life of a build") : ARCHITECTURE.index('## What "equal" means')]
    names = {
        part
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", lives)
        if not name.endswith(".py")
        for part in name.split(".")
    }
    assert len(names) > 40
    assert [name for name in names if not re.search(rf"\b{name}\b", CODE)] == []


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")]


SECURITY = (ROOT / "docs" / "security.md").read_text()


def test_every_option_and_variable_of_the_page_on_security_exists() -> None:
    """The commands' own are typed below."""
    text = re.sub(r"^\$ .*", "", SECURITY, flags=re.MULTILINE)
    names = set(re.findall(r"--[a-z][a-z-]+|ENGINEHOUSE_[A-Z_]+", text))
    options = {
        option
        for command in (main, *main.commands.values())
        for parameter in command.params
        for option in parameter.opts
    }
    made = {f"--executor-{name}" for name in ("tls-ca", "tls-cert", "tls-key", "api-key-file")}
    made |= {name.replace("--executor", "ENGINEHOUSE_EXECUTOR").replace("-", "_").upper() for name in made}
    assert len(names) > 20
    assert [name for name in names if name not in options | made and f'"{name}"' not in CODE] == []


def test_the_reasons_and_fields_of_the_page_on_security_exist() -> None:
    names = set(re.findall(r"`([A-Z]+_[A-Z_]+)`|\"([a-z_]+)\":", SECURITY))
    found = {name for pair in names for name in pair if name and not name.startswith("ENGINEHOUSE_")}
    assert len(found) > 10
    assert [name for name in found if not re.search(rf"\b{name}\b", CODE)] == []


OTHERS = {"make", "pip", "git", "torchrun", "helm", "kubectl", "docker", "curl", "mkdir", "for", "sleep"}


@pytest.mark.parametrize("command", commands(README), ids=" ".join)
def test_every_command_of_the_readme_can_be_typed(command: list[str]) -> None:
    """Parsed, not run; the integration tests run them."""
    program, *arguments = command
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif arguments[0] == "-m":
        usage = (ROOT / arguments[1] / "__main__.py").read_text()
        assert [option for option in arguments if option.startswith("--") and f'"{option}"' not in usage] == []
    else:
        assert program in (".venv/bin/enginehouse", "enginehouse")
        command, context = main, Context(main)
        while isinstance(command, Group) and arguments and not arguments[0].startswith("-"):
            name, *arguments = arguments
            command = command.get_command(context, name)
            assert command is not None, name
        command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("page", [page for page in documents.PAGES if page != "cli.md"])
def test_every_command_of_a_page_can_be_typed_and_is_run_or_says_what_it_needs(page: str) -> None:
    """Parsed here; a test runs each that needs nothing special (`tests/documents.py`)."""
    assert {block.needs for block in documents.blocks(page)} <= documents.NEEDS | {""}
    for line in [command for block in documents.blocks(page) for command in block.commands]:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        while words and words[0] == "enginehouse":
            end = words.index("--") if "--" in words else len(words)
            test_every_command_of_the_readme_can_be_typed(words[:end])
            words = words[end + 1 :]
        if words[:1] == ["python"]:
            assert not re.match(
                "(gateway|builder_svc|executor_svc|protos|bench)", words[2]
            ) or importlib.util.find_spec(words[2])
        else:
            assert not words or words[0] in OTHERS or os.access(ROOT / words[0], os.X_OK), line
    if page in documents.OWN and documents.commands(page):
        assert f'"{page}"' in (ROOT / documents.OWN[page]).read_text(), "it does not read the page"


def test_relative_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"

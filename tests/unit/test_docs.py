"""What the documents name exists: files, functions, commands and their options."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click import Context, Group

from enginehouse.cli import main

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
        assert program == ".venv/bin/enginehouse"
        command, context = main, Context(main)
        while isinstance(command, Group) and arguments and not arguments[0].startswith("-"):
            name, *arguments = arguments
            command = command.get_command(context, name)
            assert command is not None, name
        command.make_context(name, arguments, parent=context)


def test_relative_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"

"""docs/migrating-from-tensorrt-llm.md says what is true of the code."""

import ast
import importlib
import inspect
import re
from typing import Any

import pytest
from test_docs import ROOT, commands
from test_docs import test_every_command_of_the_readme_can_be_typed as check_typed

import enginehouse
from enginehouse import LLM, BuildConfig, KvCacheConfig, SamplingParams

PAGE = (ROOT / "docs" / "migrating-from-tensorrt-llm.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CODE = r"`([^`]+)`"
FILE = r".*\.(json|safetensors|engine)"


def section(heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables' rows, heads and rules apart."""
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rules = [at for at, row in enumerate(cells) if set(row[0]) == {"-"}]
    return [row for at, row in enumerate(cells) if at not in rules and at + 1 not in rules]


OURS = [code for *_, ours in rows(PAGE[: PAGE.index("## What behaves differently")]) for code in re.findall(CODE, ours)]
INLINE = re.findall(r"`(enginehouse [^`]+)`", PAGE)


def look_up(path: str) -> Any:
    """What a dotted name stands for. Raises AttributeError if it is nothing."""
    root, *names = path.split(".")
    found: Any = enginehouse
    if root == "hlapi":
        found = importlib.import_module("enginehouse.hlapi")
    elif root != "enginehouse":
        found = getattr(enginehouse, root)
    for name in names:
        if found is enginehouse and name == "hlapi":
            found = importlib.import_module("enginehouse.hlapi")
        elif name in getattr(found, "__dataclass_fields__", {}):
            found = found.__dataclass_fields__[name]
        else:
            found = getattr(found, name)
    return found


def resolve(code: str) -> bool:
    """Whether it is a name or a call of ours; if it is, all of it must be there."""
    try:
        node = ast.parse(code, mode="eval").body
    except SyntaxError:
        return False
    if isinstance(node, ast.Call):
        parameters = inspect.signature(look_up(ast.unparse(node.func))).parameters
        assert {keyword.arg for keyword in node.keywords} <= {*parameters}, code
        return True
    names = isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and re.fullmatch(r"[A-Z]+[a-z]\w*", code))
    if not names or re.fullmatch(FILE, code):
        return False
    look_up(code)
    return True


def test_every_name_of_ours_in_the_tables_exists() -> None:
    assert sum(resolve(code) for code in OURS if not code.startswith("enginehouse ")) > 70


@pytest.mark.parametrize("name", ["Engine.from_buffer", "BuildConfig.update", "BuildConfig.from_json_file"])
def test_what_is_said_to_have_no_counterpart_has_none(name: str) -> None:
    assert f"`{name}`" in section("What is absent")
    with pytest.raises(AttributeError):
        look_up(name)


@pytest.mark.parametrize(("heading", "table"), [("What is absent", "OFF"), ("Options that have no effect", "IGNORED")])
@pytest.mark.parametrize("kind", [BuildConfig, SamplingParams, KvCacheConfig, LLM])
def test_options_stand_in_the_section_that_is_true_of_them(kind: type, heading: str, table: str) -> None:
    named = {row[0]: re.findall(CODE, row[1]) for row in rows(section(heading))}
    assert sorted(named[f"`{kind.__name__}`"]) == sorted(getattr(kind, table))


def test_defaults() -> None:
    stated = {row[0]: row[2] for row in rows(section("What behaves differently"))}
    for name in ("max_batch_size", "max_num_tokens", "device"):
        assert stated[f"`BuildConfig.{name}`"] == str(getattr(BuildConfig(), name))
    for name in stated:
        look_up(name.strip("`"))


@pytest.mark.parametrize("block", PYTHON)
def test_python_compiles_and_imports_what_there_is(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        assert not isinstance(node, ast.Import)


def test_the_first_lines_import_what_there_is() -> None:
    (line,) = re.findall(r"^\+from enginehouse import (.*)$", PAGE, re.MULTILINE)
    assert [name for name in line.split(", ") if not hasattr(enginehouse, name)] == []


@pytest.mark.parametrize(
    "command", [*commands(PAGE), *commands("\n".join(f"$ {code}" for code in INLINE))], ids=" ".join
)
def test_every_command_can_be_typed(command: list[str]) -> None:
    """Parsed, not run; behind `--` stands another one."""
    while command:
        program, *rest = command
        assert program == "enginehouse"
        end = rest.index("--") if "--" in rest else len(rest)
        check_typed([".venv/bin/enginehouse", *rest[:end]])
        command = rest[end + 1 :]


def test_there_are_blocks_and_commands() -> None:
    assert len(PYTHON) >= 2 and len(commands(PAGE)) >= 4 and len(INLINE) >= 8

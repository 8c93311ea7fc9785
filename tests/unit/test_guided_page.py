"""docs/guided-output.md says what is true of the code."""

import re
import shlex

import pytest
from test_docs import ROOT
from test_docs import test_every_command_of_the_readme_can_be_typed as check_typed

from engine.token_table import FILE, TokenTable
from enginehouse import GuidedDecodingParams
from executor_svc import grammar_trial, guides
from executor_svc.grammars import Grammar, compile_grammar, vocabulary
from protos import guidance

PAGE = (ROOT / "docs" / "guided-output.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)

COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def test_grammars_of_the_page_are_grammars() -> None:
    tokens = vocabulary(TokenTable(tuple(bytes([byte]) for byte in range(256)), ()))
    grammars = [text for kind, text in BLOCKS if kind in ("lark", "ebnf")]
    assert len(grammars) == 2
    for text in grammars:
        compile_grammar(tokens, Grammar("grammar", text))


def test_python_of_the_page_is_python() -> None:
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    compile(code, "page", "exec")
    names = set(re.findall(r"`(\w+)=", PAGE))
    assert names == set(GuidedDecodingParams.__dataclass_fields__)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_can_be_typed(line: str) -> None:
    check_typed([".venv/bin/enginehouse", *shlex.split(line)[1:]])


def test_numbers_of_the_page() -> None:
    for number, unit in (
        (guidance.MAX_BYTES, "bytes"),
        (guidance.MAX_CHOICES, "choices"),
        (guidance.MAX_DEPTH, "brackets deep"),
        (int(guides.COMPILE_SECONDS), "s or 2 GiB to compile"),
        (guides._MOST_PENDING, "requests wait"),
        (guides._MOST_GRAMMARS, "grammars"),
        (grammar_trial._TOKENS, "tokens, in a process"),
    ):
        assert re.search(rf"\b{number:,}\s+{unit}", PAGE), (number, unit)
    assert grammar_trial._MEMORY == 2 << 30
    assert f"`{FILE}`" in PAGE

"""The pages of docs/, as a test needs them: their commands, and what these need that a test does not have."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = tuple(sorted(path.name for path in DOCS.glob("*.md")))

NEEDS = {"a GPU", "a cluster", "several machines", "the internet"}
"""What `<!-- needs: ... -->` before a block may say: its commands are run by no test."""

OWN = {
    "cli.md": "tests/unit/test_cli_help.py",  # whose commands are those of the help
    "kubernetes.md": "tests/integration/test_kubernetes.py",
    "operations.md": "tests/integration/test_operations.py",
    "quickstart.md": "tests/integration/test_quickstart.py",
}
"""Pages whose commands have a test of their own; tests/integration/test_pages.py runs those of all others."""

_NEEDS = re.compile(r"<!-- needs: (.+) -->")
_PROGRAM = re.compile(r" {4}(enginehouse|python3?|pip|docker|helm|kubectl|torchrun|git|curl) ")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        kind: what stands behind the fence, "console" or "python"; "indented" for one without.
        needs: what it cannot be run without, one of `NEEDS`; empty runs anywhere.
    """

    kind: str
    text: str
    needs: str

    @property
    def commands(self) -> list[str]:
        """What is typed: behind "$ " on a console; else each line, with those that it goes on in."""
        lines = self.text.splitlines()
        if self.kind == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        if self.kind in ("sh", "bash", "shell", "indented"):
            return [line for line in re.split(r"(?<!\\)\n", self.text) if line and not line.startswith("#")]
        return []


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All fenced blocks of a page of docs/, and the indented ones that begin with a program, in their order."""
    return tuple(_parse((DOCS / page).read_text()))


def commands(page: str, needs: str = "") -> list[str]:
    """The commands of a page of docs/ that need this, and no other ones."""
    return [command for block in blocks(page) if block.needs == needs for command in block.commands]


def _parse(text: str) -> Iterator[Block]:
    lines, needs = iter(text.splitlines()), ""
    for line in lines:
        if match := _NEEDS.fullmatch(line):
            needs = match[1]
            continue
        if line.startswith("```"):
            inside = []
            for inner in lines:
                if inner == "```":
                    break
                inside.append(inner)
            yield Block(line.removeprefix("```"), "\n".join(inside), needs)
        elif _PROGRAM.match(line):
            inside = [line]
            for inner in lines:
                if not inner.startswith("    "):
                    break
                inside.append(inner)
            yield Block("indented", "\n".join(each[4:] for each in inside), needs)
        if line:
            needs = ""

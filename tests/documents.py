"""The pages of docs/, as a test needs them: their commands, and what these need that a test does not have."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        kind: "console", "python", ...
        needs: what it cannot be run without, such as "a GPU" or "a cluster"; empty runs anywhere.
    """

    kind: str
    text: str
    needs: str

    @property
    def commands(self) -> list[str]:
        """The lines that begin with "$ ", without it."""
        return [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All of a page of docs/, in their order."""
    text = (DOCS / page).read_text()
    return tuple(Block(found["kind"], found["text"], found["needs"] or "") for found in _BLOCK.finditer(text))


def commands(page: str, needs: str = "") -> list[str]:
    """The commands of a page of docs/ that need this, and no other ones."""
    return [command for block in blocks(page) if block.needs == needs for command in block.commands]

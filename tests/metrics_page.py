"""What docs/metrics.md says of each metric."""

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


class Row(NamedTuple):
    kind: str
    labels: tuple[str, ...]
    unit: str
    meaning: str


def documented() -> dict[str, Row]:
    """By the metric's name."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `enginehouse_"):
            name, kind, labels, unit, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            assert name.strip("`") not in found, f"{name} stands there twice"
            found[name.strip("`")] = Row(kind, tuple(re.findall("`(.*?)`", labels)), unit, meaning)
    return found

"""How results are printed: JSON for programs, columns for people."""

import json
from collections.abc import Sequence
from typing import TextIO


def print_json(value: object) -> None:
    """Indented JSON."""
    print(json.dumps(value, indent=1))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str, file: TextIO | None = None) -> None:
    """Rows under a head, columns as wide as they need; `empty` when there are no rows. On stdout, or in another file."""
    if not rows:
        print(empty, file=file)
        return
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for line in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=file)

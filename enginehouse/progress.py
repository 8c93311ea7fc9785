"""How far long work is: bars on a terminal, lines elsewhere, always on stderr so that stdout holds results only."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

_LINE_EVERY = 10.0  # seconds between two lines about a step that goes on


def stderr() -> Console:
    """Where messages to a person go; text is printed as it is."""
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def format_bytes(count: int) -> str:
    """In decimal units, with three digits or so: "4.93 MB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def format_amount(done: int, total: int, unit: str) -> str:
    """How much of a step is done: "3.10 / 4.93 MB", "12 / 48 tensors"; empty when nothing is counted."""
    if not total or (total == 1 and not unit):
        return ""
    if unit != "bytes":
        return f"{done} / {total} {unit}".rstrip()
    short, whole = format_bytes(done).split(" "), format_bytes(total).split(" ")
    first = short[0] if short[1] == whole[1] else " ".join(short)
    return f"{first} / {' '.join(whole)}"


class _AmountColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(format_amount(int(task.completed), int(task.total or 0), task.fields["unit"]))


class Bars:
    """Steps of work that begin when they are first heard of and end when done reaches total.

    On a terminal a bar each, gone when all of it ends (the caller then says what came of it); elsewhere a line when a step
    ends, and every 10 s while it goes on.
    """

    def __init__(self, console: Console, label: str = "") -> None:
        """`label` says what the steps belong to, such as a model's name."""
        self._console = console
        self._label = f"{label}: " if label else ""
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}  # step -> when its last line was printed; infinite once it has ended
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            _AmountColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        self._waiting = self._bars.add_task(f"{self._label}starting", total=None, unit="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, step: str, done: int, total: int, unit: str = "") -> None:
        """`done` of `total` units; a total of 0 is one that is not known."""
        if self._console.is_terminal:
            if step not in self._tasks:
                self._bars.update(self._waiting, visible=False)
                self._tasks[step] = self._bars.add_task(f"{self._label}{step}", total=None, unit=unit)
            self._bars.update(self._tasks[step], completed=done, total=total or None)
            return
        now = time.monotonic()
        ended = total > 0 and done >= total
        if ended or now - self._said.setdefault(step, now) >= _LINE_EVERY:
            if self._said.get(step) != float("inf"):
                amount = format_amount(done, total, unit) or ("done" if ended else "...")
                self._console.print(f"{self._label}{step} {amount}")
            self._said[step] = float("inf") if ended else now

"""`enginehouse load`: an engine into executors that run already."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing

from rich.console import Console

from engine.errors import FailedPrecondition
from enginehouse.client import ExecutorClient
from enginehouse.home import Home
from enginehouse.progress import Bars, stderr


def run(engine: str, executors: Sequence[str], home: Home) -> None:
    """Loads an engine, by model name or id, into these executors, or into those of the running local cluster.

    Raises:
        FailedPrecondition: no executor is given and no cluster runs on the data folder.
    """
    running = home.running()
    addresses = executors or (running.executors if running else ())
    if not addresses:
        raise FailedPrecondition(
            f"no cluster runs on {home.root}: start one with `enginehouse up {engine}`, or name executors with --executor",
            reason="EXECUTOR_MISSING",
        )
    asyncio.run(load(engine, addresses, engine, stderr()))


async def load(engine: str, executors: Sequence[str], name: str, console: Console) -> None:
    """Loads an engine, by model name or id, into all of these executors at once, with a bar for each."""
    began = time.monotonic()
    with Bars(console, name) as bars:
        await asyncio.gather(*(_load(engine, address, f"executor-{n}", bars) for n, address in enumerate(executors, 1)))
    count = f"{len(executors)} executor{'' if len(executors) == 1 else 's'}"
    console.print(f"{name}: loaded by {count} in {time.monotonic() - began:.1f} s")


async def _load(engine: str, address: str, label: str, bars: Bars) -> None:
    async with ExecutorClient(address) as executor, aclosing(executor.load(engine)) as progress:
        async for step in progress:
            if step.bytes_total:
                bars.update(label, step.bytes_done, step.bytes_total, "bytes")

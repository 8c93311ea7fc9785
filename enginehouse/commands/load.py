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
from enginehouse.tables import print_json


def run(
    engine: str,
    executors: Sequence[str],
    home: Home,
    *,
    kv_memory: int = 0,
    evict: bool = False,
    as_json: bool = False,
) -> None:
    """Loads an engine, by model name or id, into these executors, or into those of the running local cluster.

    Args:
        kv_memory, evict: as `ExecutorClient.load` takes them.

    Raises:
        FailedPrecondition: no executor is given and no cluster runs on the data folder.
    """
    addresses = executors_of(executors, home, f"start one with `enginehouse up {engine}`")
    began = time.monotonic()
    engine_id = asyncio.run(load(engine, addresses, engine, stderr(), kv_memory, evict))
    if as_json:
        seconds = round(time.monotonic() - began, 3)
        print_json({"engine": engine, "engine_id": engine_id, "executors": list(addresses), "seconds": seconds})


def executors_of(given: Sequence[str], home: Home, fix: str) -> Sequence[str]:
    """Those that were named, or else the running local cluster's. Raises FailedPrecondition where there are none."""
    running = home.running()
    addresses = given or (running.executors if running else ())
    if not addresses:
        raise FailedPrecondition(
            f"no cluster runs on {home.root}: {fix}, or name executors with --executor", reason="EXECUTOR_MISSING"
        )
    return addresses


async def load(
    engine: str, executors: Sequence[str], name: str, console: Console, kv_memory: int = 0, evict: bool = False
) -> str:
    """Loads an engine, by model name or id, into all of these executors at once, with a bar for each; returns its id."""
    began = time.monotonic()
    with Bars(console, name) as bars:
        ids = await asyncio.gather(
            *(_load(engine, address, f"executor-{n}", bars, kv_memory, evict) for n, address in enumerate(executors, 1))
        )
    count = f"{len(executors)} executor{'' if len(executors) == 1 else 's'}"
    console.print(f"{name}: loaded by {count} in {time.monotonic() - began:.1f} s")
    return ids[0]


async def _load(engine: str, address: str, label: str, bars: Bars, kv_memory: int, evict: bool) -> str:
    engine_id = ""
    async with (
        ExecutorClient(address) as executor,
        aclosing(executor.load(engine, kv_memory=kv_memory, evict=evict)) as progress,
    ):
        async for step in progress:
            if step.bytes_total:
                bars.update(label, step.bytes_done, step.bytes_total, "bytes")
            if step.HasField("engine"):
                engine_id = step.engine.engine_id
    return engine_id

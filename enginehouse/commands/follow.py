"""What commands do with a builder's job: submit it and show how far it is, or watch one that is there."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from rich.console import Console

from engine.errors import EnginehouseError, FailedPrecondition, Unavailable
from enginehouse.client import BuilderClient
from enginehouse.progress import Bars
from protos.rpc import from_failure
from protos.v1.builder_pb2 import (
    BUILD_STATE_CANCELLED,
    BUILD_STATE_FAILED,
    BUILD_STATE_SUCCEEDED,
    Build,
    BuildEvent,
    BuildSpec,
)

_WARNING = re.compile(r"^\S+ \S+ WARNING (?P<message>.+)$", re.MULTILINE)  # as a build's process logs it
_RECONNECT = 60.0  # seconds; a killed builder's job is another one's after 20


async def follow(builder: BuilderClient, spec: BuildSpec, name: str, bars: Bars, console: Console) -> Build:
    """Submits a build and shows its progress and warnings until it has succeeded. Cancelled, it cancels the build and says so.

    Raises:
        EnginehouseError: the build's own error, or that it was cancelled by somebody else.
    """
    job = await builder.submit(spec, name)
    try:
        async with aclosing(watch(builder, job.build_id, console)) as events:
            async for event in events:
                if event.HasField("progress"):
                    step = event.progress
                    bars.update(step.phase, step.done, step.total, step.unit)
                elif event.HasField("state"):
                    job = event.state
                else:
                    for warning in _WARNING.finditer(event.log):
                        console.print(f"{name}: {warning['message']}")
    except asyncio.CancelledError:
        await _cancel(builder, job.build_id, console)
        raise
    if job.state == BUILD_STATE_FAILED:
        raise from_failure(job.failure)
    if job.state == BUILD_STATE_CANCELLED:
        raise FailedPrecondition(f"build {job.build_id} was cancelled", reason="BUILD_CANCELLED")
    if job.state != BUILD_STATE_SUCCEEDED:
        raise Unavailable(f"the builder at {builder.address} stopped reporting before build {job.build_id} had ended")
    return job


async def watch(builder: BuilderClient, build_id: str, console: Console) -> AsyncGenerator[BuildEvent, None]:
    """The job's events to its end. A builder that is lost is tried again for some time: the job goes on at the next one."""
    first, lost_at = 0, None
    while True:
        try:
            async with aclosing(builder.watch(build_id, first)) as events:
                async for event in events:
                    first, lost_at = event.sequence + 1, None
                    yield event
            return
        except Unavailable as error:
            if lost_at is None:
                lost_at = time.monotonic()
                console.print(f"{error.message}; trying again for {_RECONNECT:.0f} s")
            if time.monotonic() - lost_at > _RECONNECT:
                raise
            await asyncio.sleep(1)


async def _cancel(builder: BuilderClient, build_id: str, console: Console) -> None:
    try:
        await builder.cancel(build_id, timeout=10)
    except EnginehouseError as error:
        console.print(f"could not cancel build {build_id}: {error}")
    else:
        console.print(f"cancelled build {build_id}")

"""`enginehouse builds`: the jobs of a builder, and of all others of its store."""

import asyncio
import json
from contextlib import aclosing

from engine.errors import FailedPrecondition
from enginehouse.client import BuilderClient
from enginehouse.commands.follow import watch
from enginehouse.home import Home
from enginehouse.progress import format_amount, stderr
from enginehouse.tables import print_json, print_table
from protos.rpc import from_failure
from protos.v1.builder_pb2 import BUILD_STATE_FAILED, Build, BuildEvent, BuildState


def find_builder(given: str | None, home: Home) -> str:
    """The builder to talk to: the one given, else that of the running cluster. Raises FailedPrecondition."""
    running = home.running()
    if not (given or running):
        raise FailedPrecondition(
            f"no cluster runs on {home.root}: start one with `enginehouse up`, or say where a builder is with --builder",
            reason="BUILDER_MISSING",
        )
    return given or (running.builder if running else "")


def run_ls(address: str, *, as_json: bool) -> None:
    """Lists jobs, newest first."""
    builds = asyncio.run(_builds(address))
    if as_json:
        print_json([_fields(build) for build in builds])
        return
    rows = [
        (
            build.build_id,
            _state(build),
            str(build.attempt or ""),
            build.model,
            build.engine_id[:12],
            build.spec.checkpoint,
        )
        for build in builds
    ]
    head = ("build", "state", "attempt", "model", "engine", "checkpoint")
    print_table(head, rows, "no builds yet: enginehouse build CHECKPOINT --builder HOST:PORT")


def run_logs(address: str, build_id: str, *, as_json: bool = False) -> None:
    """Prints what a build has printed and how far it came, until it ends. Raises what it failed with."""
    asyncio.run(_logs(address, build_id, as_json))


def run_cancel(address: str, build_id: str, *, as_json: bool = False) -> None:
    """Ends a job and says how it ended."""
    build = asyncio.run(_cancel(address, build_id))
    if as_json:
        print_json(_fields(build))
    else:
        print(f"{build_id}: {_state(build)}")


async def _builds(address: str) -> list[Build]:
    async with BuilderClient(address) as builder:
        return await builder.builds()


async def _logs(address: str, build_id: str, as_json: bool) -> None:
    async with BuilderClient(address) as builder, aclosing(watch(builder, build_id, stderr())) as events:
        async for event in events:
            print(json.dumps(_event_fields(event)) if as_json else _event_line(event), flush=True)
            if event.HasField("state") and event.state.state == BUILD_STATE_FAILED:
                raise from_failure(event.state.failure)


def _event_line(event: BuildEvent) -> str:
    if event.HasField("log"):
        return event.log
    at = event.time.ToDatetime().isoformat(sep=" ", timespec="seconds")
    if event.HasField("state"):
        attempt = f", attempt {event.state.attempt}" if event.state.attempt > 1 else ""
        return f"{at} {_state(event.state)}{attempt}"
    step = event.progress
    return f"{at} {step.phase} {format_amount(step.done, step.total, step.unit)}".rstrip()


def _event_fields(event: BuildEvent) -> dict[str, object]:
    at = {"time": event.time.ToJsonString()}
    if event.HasField("log"):
        return {**at, "log": event.log}
    if event.HasField("state"):
        return {**at, **_fields(event.state)}
    step = event.progress
    return {**at, "phase": step.phase, "done": step.done, "total": step.total, "unit": step.unit}


async def _cancel(address: str, build_id: str) -> Build:
    async with BuilderClient(address) as builder:
        return await builder.cancel(build_id)


def _state(build: Build) -> str:
    return BuildState.Name(build.state).removeprefix("BUILD_STATE_").lower()


def _fields(build: Build) -> dict[str, object]:
    return {
        "build_id": build.build_id,
        "state": _state(build),
        "attempt": build.attempt,
        "model": build.model,
        "engine_id": build.engine_id,
        "reused": build.reused,
        "checkpoint": build.spec.checkpoint,
        "created": build.created.ToJsonString(),
        "ended": build.ended.ToJsonString() if build.HasField("ended") else None,
        "failure": build.failure.message if build.HasField("failure") else None,
    }

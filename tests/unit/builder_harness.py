"""What the builder's tests share: stand-ins for the process of a build, which are real processes without torch."""

import asyncio
import sys
from pathlib import Path

from engine import registry
from engine.blobs import describe, put_bytes
from engine.errors import EnginehouseError
from engine.fingerprint import Fingerprint
from engine.manifest import Limits, Manifest, ModelFacts, Parallelism, Rank, engine_id
from engine.store import Store
from protos.v1.builder_pb2 import Build, BuildEvent, BuildState

_PRELUDE = """
import json, os, signal, subprocess, sys, time
request = json.loads(sys.stdin.readline())
def send(**event):
    print(json.dumps(event), flush=True)
def progress(phase, done, total, unit="bytes"):
    send(type="progress", phase=phase, done=done, total=total, unit=unit)
def result(engine_id="0" * 64, reused=False):
    send(type="result", engine_id=engine_id, reused=reused)
def hang():
    progress("weights", 1, 2)
    time.sleep(60)
"""

_REAL_PRELUDE = """
import os, signal, subprocess, sys, time
from builder_svc.child import main
from builder_svc.process import Result
from engine.errors import *
"""


def child(body: str) -> list[str]:
    """The command line of a process that behaves as `body` says, in plain Python."""
    return [sys.executable, "-I", "-S", "-c", _PRELUDE + body]


def real_child(build: str) -> list[str]:
    """The command line of the real child around another `build(request, progress)`, given as its body."""
    body = "".join(f"    {line}\n" for line in build.splitlines())
    return [sys.executable, "-c", f"{_REAL_PRELUDE}def build(request, progress):\n{body}sys.exit(main(build))"]


def publish(store: Store, variant: int = 0) -> str:
    """The id of a small engine that is now in the store."""
    identity = {"variant": variant}
    program, weights = describe("program.json", b"{}"), describe("weights", b"w")
    for name, data in (("program.json", b"{}"), ("weights", b"w")):
        put_bytes(store, name, data)
    manifest = Manifest(
        engine_id=engine_id(identity),
        identity=identity,
        source="demo",
        created="2026-01-01T00:00:00+00:00",
        model=ModelFacts("LlamaForCausalLM", 10, 1, 8, 2, 1, "float32", 64, (2,), 100),
        limits=Limits(4, 128, 64),
        mapping=Parallelism(),
        fingerprint=Fingerprint("torch", "cpu"),
        ranks=(Rank(program, (weights,)),),
        tokenizer=(),
    )
    return registry.publish(store, manifest).engine_id


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def ends(pid: int, seconds: float = 50) -> bool:
    """Whether a process that is not our child ends in time."""
    for _ in range(int(seconds / 0.02)):
        if not is_running(pid):
            return True
        await asyncio.sleep(0.02)
    return False


async def failure(awaitable: object) -> EnginehouseError:
    """The error that an awaitable ends with."""
    try:
        await awaitable  # type: ignore[misc]
    except EnginehouseError as error:
        return error
    raise AssertionError("it did not fail")


def state(build: Build) -> str:
    """A build's state, such as "RUNNING"."""
    return BuildState.Name(build.state).removeprefix("BUILD_STATE_")


def short(event: BuildEvent) -> str:
    """An event in a word or three."""
    if event.HasField("state"):
        return state(event.state)
    if event.HasField("log"):
        return f"log {event.log}"
    return f"{event.progress.phase} {event.progress.done}/{event.progress.total}"

"""Signed engines through real processes: keys of the CLI, a builder that signs, executors that trust its key or another's."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from engine import signing
from engine.directory import DirectoryStore
from engine.errors import FailedPrecondition
from enginehouse.client import BuilderClient, ExecutorClient
from protos.v1 import executor_pb2 as pb
from protos.v1.builder_pb2 import BUILD_STATE_SUCCEEDED, Build, BuildSpec
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria
from protos.v1.executor_pb2_grpc import ExecutorStub
from tests.integration.services import Service, service

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


@dataclass
class Key:
    """A private key in a file, and its public one in another."""

    path: Path
    trusted: Path
    id: str

    @staticmethod
    def typed(directory: Path) -> "Key":
        """As people make it."""
        path, trusted = directory / "private.key", directory / "trusted.pem"
        made = json.loads(enginehouse("keys", "generate", str(path), "--json"))
        shown = enginehouse("keys", "show", str(path))
        assert made["key_id"] in shown and made["public_key"] in shown
        trusted.write_text(shown)
        return Key(path, trusted, made["key_id"])

    @staticmethod
    def made(directory: Path) -> "Key":
        """The same without two more processes."""
        path, trusted = directory / "private.key", directory / "trusted.pem"
        public = signing.generate(path).public
        trusted.write_text(public.pem())
        return Key(path, trusted, public.id)


@dataclass
class Seen:
    """What /proc tells of the process of a build: command lines, environments and open files of all looks at it."""

    command: set[bytes] = field(default_factory=set)
    environment: set[bytes] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    def look(self, builder: int) -> None:
        for pid in Path(f"/proc/{builder}/task/{builder}/children").read_text().split():
            process = Path("/proc", pid)
            with suppress(OSError):  # it has just ended
                command = (process / "cmdline").read_bytes()
                if b"builder_svc.child" not in command:
                    continue  # not yet: until then it is a copy of the builder
                self.command.add(command)
                self.environment.add((process / "environ").read_bytes())
                self.files |= {str(link.readlink()) for link in (process / "fd").iterdir()}


@dataclass
class Signed:
    """An engine that a builder with a key has made and signed."""

    store: DirectoryStore
    key: Key
    other: Key
    build: Build
    seen: Seen


def enginehouse(*arguments: str) -> str:
    command = [sys.executable, "-m", "enginehouse", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


async def build(builder: Service, seen: Seen) -> Build:
    async with BuilderClient(builder.address) as client:
        job = await client.submit(BuildSpec(checkpoint=str(DEMO)), "demo")
        watching = asyncio.create_task(last_state(client, job))
        while not watching.done():
            seen.look(builder.process.pid)
            await asyncio.wait((watching,), timeout=0.1)
        return watching.result()


async def last_state(client: BuilderClient, job: Build) -> Build:
    async for event in client.watch(job.build_id):
        if event.HasField("state"):
            job = event.state
    return job


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signed]:
    directory = tmp_path_factory.mktemp("signing")
    for name in ("builders-own", "other"):
        (directory / name).mkdir()
    key, other = Key.typed(directory / "builders-own"), Key.made(directory / "other")
    store, seen = DirectoryStore(directory / "store"), Seen()
    arguments = ["--store", str(store.root), "--checkpoint-root", str(DEMO.parent)]
    with service("builder_svc", directory / "log", *arguments, "--signing-key", str(key.path)) as builder:
        job = asyncio.run(build(builder, seen))
    assert job.state == BUILD_STATE_SUCCEEDED, job.failure.message
    yield Signed(store, key, other, job, seen)


@pytest.fixture
def executor(signed: Signed, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    """One that trusts the key that the test names."""
    key: Key = getattr(signed, request.param)
    arguments = ["--store", str(signed.store.root), "--trusted-keys", str(key.trusted)]
    with service("executor_svc", tmp_path / "log", *arguments) as started:
        yield started


@pytest.fixture
async def client(executor: Service) -> AsyncIterator[ExecutorClient]:
    async with ExecutorClient(executor.address) as client:
        yield client


def test_the_builds_process_does_not_know_the_key(signed: Signed) -> None:
    """It reads what clients bring. Neither do the job's records, which other builders and all clients can read."""
    folder = signed.key.path.parent.name
    assert signed.seen.command and any(b"PATH=" in one for one in signed.seen.environment) and signed.seen.files
    assert not [one for one in signed.seen.command | signed.seen.environment if folder.encode() in one]
    assert not [one for one in signed.seen.files if folder in one]
    kept = [Path(root, name) for root, _, names in os.walk(signed.store.root) for name in names]
    assert any(signed.build.build_id in str(path) for path in kept)
    assert not [path for path in kept if folder.encode() in (data := path.read_bytes()) or b"PRIVATE KEY" in data]


@pytest.mark.parametrize("executor", ["key"], indirect=True)
async def test_who_trusts_the_builder_runs_its_engines(
    signed: Signed, executor: Service, client: ExecutorClient
) -> None:
    steps = [step async for step in client.load("demo")]
    assert steps[-1].engine.engine_id == signed.build.engine_id
    submit = pb.Submit(
        engine_id=signed.build.engine_id,
        token_ids=range(2, 10),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingCriteria(max_tokens=12, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(executor.address) as channel:
        tokens = [token async for output in ExecutorStub(channel).Generate(submit) for token in output.token_ids]
    assert len(tokens) == 12


@pytest.mark.parametrize("executor", ["other"], indirect=True)
async def test_who_trusts_somebody_else_does_not(signed: Signed, client: ExecutorClient) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        async for step in client.load("demo"):
            assert not step.bytes_done  # nothing of it is read
    error = caught.value
    assert error.reason == "ENGINE_UNSIGNED"
    assert f"signed only by {signed.key.id}; trusted here: {signed.other.id}" in error.message
    assert f"enginehouse engines sign {signed.build.engine_id} --key" in error.message

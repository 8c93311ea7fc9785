"""What every service does around its servicer, through real servers on a free port."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine import errors
from engine.errors import EnginehouseError, NotFound, Unavailable
from protos import rpc
from protos.v1 import builder_pb2, builder_pb2_grpc, executor_pb2, executor_pb2_grpc
from protos.v1.common_pb2 import Failure

KINDS = [
    errors.InvalidArgument,
    errors.DeadlineExceeded,
    errors.NotFound,
    errors.PermissionDenied,
    errors.ResourceExhausted,
    errors.FailedPrecondition,
    errors.Unimplemented,
    errors.Internal,
    errors.Unavailable,
    errors.DataLoss,
]


class Builder(builder_pb2_grpc.BuilderServicer):
    """Answers GetBuild and WatchBuild with what it was told to; the other methods are not there."""

    SubmitBuild = ListBuilds = CancelBuild = ListModelNames = SetModelName = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.closed = asyncio.Event()
        self.hold = False

    async def GetBuild(self, request: builder_pb2.GetBuildRequest, context: Any) -> builder_pb2.Build:
        if self.error:
            raise self.error
        return builder_pb2.Build(build_id=request.build_id)

    async def WatchBuild(self, request: builder_pb2.WatchBuildRequest, context: Any) -> AsyncIterator[Any]:
        try:
            yield builder_pb2.BuildEvent(sequence=0)
            if self.error:
                raise self.error
            while self.hold:
                yield builder_pb2.BuildEvent(sequence=1)
        finally:
            self.closed.set()


class Executor(executor_pb2_grpc.ExecutorServicer):
    LoadEngine = UnloadEngine = GetStatus = Generate = None  # type: ignore[assignment]

    async def Run(self, requests: AsyncIterator[executor_pb2.Command], context: Any) -> AsyncIterator[Any]:
        async for _ in requests:
            yield executor_pb2.StepOutput()
        raise NotFound("no more", reason="NO_MORE")


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
async def channel(builder: Builder) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[rpc.ErrorInterceptor()])
    builder_pb2_grpc.add_BuilderServicer_to_server(builder, server)
    executor_pb2_grpc.add_ExecutorServicer_to_server(Executor(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def failed(call: Awaitable[object]) -> EnginehouseError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return rpc.from_rpc_error(caught.value)


async def drained(stream: Any) -> list[Any]:
    messages = []
    while (message := await stream.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


# Errors


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_goes_through_the_wire_whole(
    channel: grpc.aio.Channel, builder: Builder, kind: type[EnginehouseError]
):
    builder.error = kind("what and how, ä\n%", reason="SOME_REASON", metadata={"build_id": "7", "ü": "ö"})
    error = await failed(builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest()))
    assert type(error) is kind
    assert (error.code, error.reason, error.message) == (kind.code, "SOME_REASON", "what and how, ä\n%")
    assert re.fullmatch("[0-9a-f]{32}", error.metadata.pop("request_id"))
    assert error.metadata == {"build_id": "7", "ü": "ö"}


@pytest.mark.parametrize("seconds", [None, 0.0, 1.5, 60.0])
async def test_when_to_retry_goes_through_the_wire_as_retry_info(
    channel: grpc.aio.Channel, builder: Builder, seconds: float | None
):
    builder.error = errors.ResourceExhausted("full", reason="QUEUE_FULL", retry_after=seconds)
    with pytest.raises(grpc.RpcError) as caught:
        await builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest())
    details = status_pb2.Status.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"]).details
    kinds = [detail.TypeName().removeprefix("google.rpc.") for detail in details]
    assert kinds == ["ErrorInfo"] + ["RetryInfo"] * (seconds is not None)
    for error in (rpc.from_rpc_error(caught.value), rpc.from_failure(rpc.to_failure(builder.error))):
        assert (error.reason, error.retry_after) == ("QUEUE_FULL", seconds)


async def test_the_status_is_a_plain_grpc_status_too(channel: grpc.aio.Channel, builder: Builder):
    builder.error = NotFound("no such build")
    with pytest.raises(grpc.RpcError) as caught:
        await builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest())
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "no such build"


async def test_an_error_that_is_not_ours_is_internal_with_its_type(channel: grpc.aio.Channel, builder: Builder):
    builder.error = KeyError("lost")
    error = await failed(builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest()))
    assert (error.code, error.reason, error.message) == (13, "INTERNAL", "KeyError: 'lost'")


@pytest.mark.parametrize("letter", ["x", "ä", "\n"])
async def test_a_long_message_is_cut_and_keeps_its_status(channel: grpc.aio.Channel, builder: Builder, letter: str):
    """More than 8 KiB of trailers would reach the client as RESOURCE_EXHAUSTED."""
    builder.error = NotFound(letter * 20_000, reason="LONG")
    error = await failed(builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest()))
    assert (type(error), error.reason) == (NotFound, "LONG")
    assert error.message.startswith(letter * 700)


async def test_a_message_with_a_broken_file_name_goes_through(channel: grpc.aio.Channel, builder: Builder):
    builder.error = NotFound(f"no {os.fsdecode(bytes([0xFF]))}")
    error = await failed(builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest()))
    assert error.message == "no \\udcff"


async def test_a_stream_fails_after_what_it_gave(channel: grpc.aio.Channel, builder: Builder):
    builder.error = NotFound("gone", reason="GONE")
    stream = builder_pb2_grpc.BuilderStub(channel).WatchBuild(builder_pb2.WatchBuildRequest())
    assert (await stream.read()).sequence == 0
    assert (await failed(drained(stream))).reason == "GONE"


async def test_a_stream_of_streams_fails_too(channel: grpc.aio.Channel):
    stream = executor_pb2_grpc.ExecutorStub(channel).Run()
    await stream.write(executor_pb2.Command())
    await stream.read()
    await stream.done_writing()
    assert (await failed(drained(stream))).reason == "NO_MORE"


async def test_what_is_no_message_is_an_invalid_argument(channel: grpc.aio.Channel):
    name = "/enginehouse.v1.Builder/"
    error = await failed(channel.unary_unary(f"{name}GetBuild")(b"\x0a\x02\xff\xfe"))  # a text that is no UTF-8
    assert (type(error), error.reason) == (errors.InvalidArgument, "REQUEST_MALFORMED")
    assert "UTF-8" in error.message and "check the client's .proto files" in error.message
    error = await failed(drained(channel.unary_stream(f"{name}WatchBuild")(b"\xff")))
    assert (type(error), error.reason) == (errors.InvalidArgument, "REQUEST_MALFORMED")
    stream = channel.stream_stream("/enginehouse.v1.Executor/Run")()
    for data in (b"", b"\xff"):
        await stream.write(data)
    assert await stream.read() == b"", "what came before is answered"
    assert (await failed(drained(stream))).reason == "REQUEST_MALFORMED"


async def test_calls_that_do_not_fail_are_left_alone(channel: grpc.aio.Channel):
    stub = builder_pb2_grpc.BuilderStub(channel)
    assert (await stub.GetBuild(builder_pb2.GetBuildRequest(build_id="7"))).build_id == "7"
    assert len(await drained(stub.WatchBuild(builder_pb2.WatchBuildRequest()))) == 1


async def test_a_method_that_is_not_there(channel: grpc.aio.Channel):
    error = await failed(channel.unary_unary("/enginehouse.v1.Builder/Nothing")(b""))
    assert isinstance(error, errors.Unimplemented)


async def test_a_lost_call_ends_the_servicers_generator(channel: grpc.aio.Channel, builder: Builder):
    builder.hold = True
    stream = builder_pb2_grpc.BuilderStub(channel).WatchBuild(builder_pb2.WatchBuildRequest())
    await stream.read()
    stream.cancel()
    await asyncio.wait_for(builder.closed.wait(), 60)


async def test_a_server_that_is_not_there_is_unavailable():
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        error = await failed(builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest()))
    assert (type(error), error.reason) == (Unavailable, "UNAVAILABLE")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_message_carries_an_error(kind: type[EnginehouseError]):
    error = rpc.from_failure(rpc.to_failure(kind("text", metadata={"a": "b"})))
    assert type(error) is kind
    assert (error.reason, error.message, error.metadata) == (kind.default_reason, "text", {"a": "b"})


def test_an_unknown_code_keeps_its_number():
    error = rpc.from_failure(Failure(code=10, reason="ABORTED", message="text"))
    assert (type(error), error.code) == (EnginehouseError, 10)


# Serving


class Service:
    """`serve` in this process."""

    def __init__(self, **options: Any) -> None:
        self.stopped: list[str] = []
        self.builder = Builder()
        self.options = options

    async def before_stop(self) -> None:
        self.stopped.append("before")
        self.builder.hold = False

    async def on_stop(self) -> None:
        self.stopped.append("on")

    def start(self, port: int = 0) -> "asyncio.Task[None]":
        def register(server: grpc.aio.Server) -> None:
            builder_pb2_grpc.add_BuilderServicer_to_server(self.builder, server)

        return asyncio.create_task(
            rpc.serve("builder", register, "127.0.0.1", port, on_stop=self.on_stop, **self.options)
        )


async def listening(capsys: pytest.CaptureFixture[str]) -> int:
    """The port, when the service says that it listens."""
    text = ""
    async with asyncio.timeout(60):
        while not text.endswith("\n"):
            await asyncio.sleep(0.01)
            text += capsys.readouterr().out
    found = re.fullmatch(r"enginehouse builder listening on 127\.0\.0\.1:(\d+)\n", text)
    assert found
    return int(found[1])


async def health(channel: grpc.aio.Channel, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_serves_until_a_signal(capsys: pytest.CaptureFixture[str], number: signal.Signals):
    service = Service()
    serving = service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await listening(capsys)}") as channel:
        assert await health(channel, "") == health_pb2.HealthCheckResponse.SERVING
        assert await health(channel, "enginehouse.v1.Builder") == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            await health(channel, "enginehouse.v1.Executor")
        await builder_pb2_grpc.BuilderStub(channel).GetBuild(builder_pb2.GetBuildRequest())
        os.kill(os.getpid(), number)
        await asyncio.wait_for(serving, 60)
    assert service.stopped == ["on"]


async def test_a_running_call_may_end(capsys: pytest.CaptureFixture[str]):
    service = Service()
    service.options["before_stop"] = service.before_stop
    service.builder.hold = True
    serving = service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await listening(capsys)}") as channel:
        stream = builder_pb2_grpc.BuilderStub(channel).WatchBuild(builder_pb2.WatchBuildRequest())
        await stream.read()
        os.kill(os.getpid(), signal.SIGTERM)
        await drained(stream)  # ends without an error
        await asyncio.wait_for(serving, 60)
    assert service.stopped == ["before", "on"]


async def test_a_call_that_does_not_end_is_cut_after_the_grace(capsys: pytest.CaptureFixture[str]):
    service = Service(grace=0.1)
    service.builder.hold = True
    serving = service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await listening(capsys)}") as channel:
        stream = builder_pb2_grpc.BuilderStub(channel).WatchBuild(builder_pb2.WatchBuildRequest())
        await stream.read()
        os.kill(os.getpid(), signal.SIGTERM)
        error = await failed(drained(stream))
        assert (type(error), error.reason) == (Unavailable, "SERVICE_STOPPED")
        await asyncio.wait_for(serving, 60)
    assert service.stopped == ["on"]


async def test_a_second_signal_ends_the_wait_of_before_stop_and_the_third_the_grace(capsys: pytest.CaptureFixture[str]):
    waits, cancelled = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        waits.set()
        try:
            await asyncio.sleep(600)
        finally:
            cancelled.set()

    service = Service(grace=600, before_stop=wait)
    service.builder.hold = True
    serving = service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await listening(capsys)}") as channel:
        stream = builder_pb2_grpc.BuilderStub(channel).WatchBuild(builder_pb2.WatchBuildRequest())
        for event in (waits, cancelled):
            await stream.read()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(event.wait(), 60)
        await asyncio.sleep(0.05)  # until it has begun to wait for the call
        os.kill(os.getpid(), signal.SIGINT)
        assert (await failed(drained(stream))).reason == "SERVICE_STOPPED"
        await asyncio.wait_for(serving, 60)
    assert service.stopped == ["on"]


async def test_limits_of_a_server_hold(capsys: pytest.CaptureFixture[str]):
    """A client holds back what is beyond its connection's streams; a message that is too large is refused."""
    service = Service(limits=(("grpc.max_concurrent_streams", 2), ("grpc.max_receive_message_length", 1000)))
    service.builder.hold = True
    serving = service.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await listening(capsys)}") as channel:
        stub = builder_pb2_grpc.BuilderStub(channel)
        streams = [stub.WatchBuild(builder_pb2.WatchBuildRequest()) for _ in range(2)]
        for stream in streams:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await stub.GetBuild(builder_pb2.GetBuildRequest(), timeout=0.3)
        assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        streams[0].cancel()
        await stub.GetBuild(builder_pb2.GetBuildRequest(), timeout=60)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await stub.GetBuild(builder_pb2.GetBuildRequest(build_id="x" * 1000), timeout=60)
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        streams[1].cancel()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 60)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


async def test_a_port_that_is_taken():
    with taken_port() as port, pytest.raises(Unavailable, match=f"127.0.0.1:{port}; is the port taken") as caught:
        await Service().start(port)
    assert caught.value.reason == "PORT_TAKEN"


async def test_two_services_do_not_share_a_port(capsys: pytest.CaptureFixture[str]):
    serving = Service().start()
    port = await listening(capsys)
    with pytest.raises(Unavailable, match="is the port taken"):
        await Service().start(port)
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


MAIN = """
import sys
from engine.errors import Unavailable
from protos import rpc
async def stop(): print("stopped", flush=True)
sys.exit(rpc.main("builder", rpc.serve("builder", lambda server: None, "127.0.0.1", int(sys.argv[1]), on_stop=stop)))
"""


@pytest.fixture
def process() -> Iterator[Callable[[int], "subprocess.Popen[str]"]]:
    started: list[subprocess.Popen[str]] = []

    def start(port: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", MAIN, str(port)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_a_process_ends_by_sigterm_with_status_0(process: Callable[[int], "subprocess.Popen[str]"]):
    child = process(0)
    assert child.stdout and "listening on 127.0.0.1:" in child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, "stopped\n", "")


def test_a_process_that_cannot_start_says_so_in_one_line(process: Callable[[int], "subprocess.Popen[str]"]):
    with taken_port() as port:
        child = process(port)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    ours = [line for line in err.splitlines() if "add_port.cc" not in line]  # that is gRPC's own log
    assert ours == [f"builder: cannot listen on 127.0.0.1:{port}; is the port taken? Choose another with --port"]

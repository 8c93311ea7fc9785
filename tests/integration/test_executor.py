"""One executor process by itself: what the gateway relies on."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine import registry
from engine.backends import open_store
from engine.errors import EnginehouseError
from protos.rpc import from_rpc_error
from protos.v1 import executor_pb2 as pb
from protos.v1.common_pb2 import FinishReason, SamplingParams, StoppingCriteria
from protos.v1.executor_pb2_grpc import ExecutorStub
from tests.integration.services import Service, service, standing


@dataclass
class Running:
    """An executor with one engine ready, and one in its store that it cannot run."""

    service: Service
    engine_id: str
    foreign_id: str
    store: str

    def submit(self, max_tokens: int, **fields: object) -> pb.Submit:
        sampling = SamplingParams(temperature=1.0, seed=7)
        stopping = StoppingCriteria(max_tokens=max_tokens, ignore_eos=True)
        given = {
            "engine_id": self.engine_id,
            "token_ids": range(2, 30),
            "sampling": sampling,
            "stopping": stopping,
            **fields,
        }
        return pb.Submit(**given)  # type: ignore[arg-type]

    def worker(self) -> int:
        pid = self.service.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.fixture(scope="module")
def running(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("executor")
    store = open_store(str(directory / "store"))
    engine_id = build(checkpoint, store=store).manifest.engine_id
    foreign_id = build(checkpoint, BuildConfig(device="cuda", dtype="float32"), store=store).manifest.engine_id
    registry.set_name(store, "tiny", engine_id)
    with service("executor_svc", directory / "log", "--store", store.url, "--engine", "tiny") as started:
        yield Running(started, engine_id, foreign_id, str(directory / "store"))


@pytest.fixture
async def stub(running: Running) -> AsyncIterator[ExecutorStub]:
    async with grpc.aio.insecure_channel(running.service.address) as channel:
        yield ExecutorStub(channel)


async def generate(stub: ExecutorStub, submit: pb.Submit) -> list[int]:
    return [token async for output in stub.Generate(submit) for token in output.token_ids]


async def ready(stub: ExecutorStub) -> None:
    for _ in range(600):
        engines = (await stub.GetStatus(pb.GetStatusRequest())).engines
        if engines and engines[0].state == pb.ENGINE_STATE_READY:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the engine does not come back")


async def error_of(call: AsyncIterator[object]) -> EnginehouseError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


async def load(stub: ExecutorStub) -> pb.EngineLoad:
    for _ in range(1200):
        found = (await stub.GetStatus(pb.GetStatusRequest())).engines[0].load
        if not found.running and not found.waiting:
            break
        await asyncio.sleep(0.05)
    return found


async def test_resumed_elsewhere_the_text_goes_on_as_it_would_have(running: Running, stub: ExecutorStub) -> None:
    whole = await generate(stub, running.submit(40))
    assert len(whole) == 40
    outputs = [output async for output in stub.Generate(running.submit(40, resume_token_ids=whole[:15]))]
    assert [token for output in outputs for token in output.token_ids] == whole[15:]
    assert outputs[-1].usage.completion_tokens == 40 and outputs[-1].usage.prompt_tokens == 28
    assert outputs[-1].finish.reason == FinishReason.FINISH_REASON_LENGTH


async def test_end_and_stop_ids_say_what_matched(running: Running, stub: ExecutorStub) -> None:
    whole = await generate(stub, running.submit(40))
    stopping = StoppingCriteria(max_tokens=40, stop_token_ids=[whole[9]], ignore_eos=True)
    outputs = [output async for output in stub.Generate(running.submit(40, stopping=stopping))]
    assert [token for output in outputs for token in output.token_ids] == whole[: whole.index(whole[9]) + 1]
    assert outputs[-1].finish.reason == FinishReason.FINISH_REASON_STOP and outputs[-1].finish.stop_token_id == whole[9]


async def test_a_call_tells_log_probabilities(running: Running, stub: ExecutorStub) -> None:
    output = {"logprobs": 3, "prompt_logprobs": 2}
    outputs = [part async for part in stub.Generate(running.submit(4, output=output))]
    prompt = [part for part in outputs if part.HasField("prompt_logprobs")]
    assert sum(len(part.prompt_logprobs.logprobs) for part in prompt) == 27
    assert sum(len(part.prompt_logprobs.top_token_ids) for part in prompt) == 27 * 2
    assert prompt[0].usage.prompt_tokens == 28 and prompt[0].usage.cached_tokens == 0
    tokens = [part for part in outputs if part.token_ids]
    assert all(len(part.logprobs.top_logprobs) == 3 * len(part.token_ids) for part in tokens)
    plain = [part async for part in stub.Generate(running.submit(4))]
    assert not any(part.HasField("logprobs") or part.HasField("prompt_logprobs") for part in plain)
    assert [list(part.token_ids) for part in plain] == [list(part.token_ids) for part in tokens]


async def test_a_beam_search_is_one_message(running: Running, stub: ExecutorStub) -> None:
    (output,) = [part async for part in stub.Generate(running.submit(5, beam_search={"width": 4}))]
    scores = [hypothesis.score for hypothesis in output.hypotheses]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert output.usage.prompt_tokens == 28 and output.usage.completion_tokens == 20 and not output.token_ids
    assert output.finish.reason == FinishReason.FINISH_REASON_LENGTH
    error = await error_of(stub.Generate(running.submit(5, beam_search={"width": 4}, resume_token_ids=[4])))
    assert (error.code, error.reason) == (3, "BEAM_SEARCH_RESUME")
    after = await load(stub)
    assert after.free_kv_blocks == after.total_kv_blocks


async def test_a_cancelled_call_frees_its_blocks(running: Running, stub: ExecutorStub) -> None:
    call = stub.Generate(running.submit(220))
    await call.read()
    call.cancel()
    after = await load(stub)
    assert after.free_kv_blocks == after.total_kv_blocks and after.running == 0


async def test_a_deadline_that_passes_ends_the_request(running: Running, stub: ExecutorStub) -> None:
    late = running.submit(220)
    late.timeout.FromSeconds(2)
    call = aiter(stub.Generate(late))
    await anext(call)
    with standing(running.worker()):
        await asyncio.sleep(2)
    error = await error_of(call)
    assert error.reason == "DEADLINE_EXCEEDED" and error.message.startswith("the deadline passed after")
    assert (await load(stub)).running == 0


async def test_an_engine_for_another_device_is_refused_in_words(running: Running, stub: ExecutorStub) -> None:
    error = await error_of(stub.LoadEngine(pb.LoadEngineRequest(engine_id=running.foreign_id)))
    assert (error.code, error.reason) == (9, "ENGINE_FINGERPRINT_MISMATCH")
    assert "needs device 'cuda'" in error.message and "--device cpu" in error.message


async def test_a_bad_request_on_a_run_stream_fails_alone(running: Running, stub: ExecutorStub) -> None:
    submits = [
        running.submit(5, handle=1),
        running.submit(200, handle=2),
        running.submit(5, handle=3, token_ids=[999]),
    ]
    commands = [pb.Command(submit=submit) for submit in submits]
    commands += [
        pb.Command(cancel=pb.Cancel(handles=[2, 77])),
        pb.Command(submit=running.submit(5, handle=4, engine_id="0" * 64)),
    ]
    failed, finished = {}, {}
    call = aiter(stub.Run(iter(commands)))

    async def follow(last: int) -> None:
        async for output in call:
            failed.update({item.handle: item.failure.reason for item in output.failed})
            finished.update({item.handle: item.finish.reason for item in output.finished})
            if last in failed:
                return

    with standing(running.worker()):  # until the front has told it all of this, and has refused the last by itself
        await follow(4)
    await follow(0)
    assert failed == {3: "TOKEN_ID_INVALID", 4: "ENGINE_NOT_LOADED"}
    assert finished == {1: FinishReason.FINISH_REASON_LENGTH, 2: FinishReason.FINISH_REASON_CANCELLED}


async def test_a_handle_that_is_in_use_ends_the_stream(running: Running, stub: ExecutorStub) -> None:
    commands = [pb.Command(submit=running.submit(200, handle=1)) for _ in range(2)]
    commands.append(pb.Command(submit=running.submit(5, handle=2, engine_id="0" * 64)))
    with standing(running.worker()):
        call = aiter(stub.Run(iter(commands)))
        assert [item.handle for item in (await anext(call)).failed] == [
            2
        ]  # the front has told the worker of the others
    error = await error_of(call)
    assert (error.code, error.reason) == (3, "HANDLE_IN_USE")
    assert (await load(stub)).running == 0


async def test_loading_while_it_is_unloaded_waits_and_loads(running: Running, stub: ExecutorStub) -> None:
    unload = asyncio.ensure_future(stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=running.engine_id)))
    async with asyncio.timeout(60):  # until the unload has begun, or is done
        while True:
            engines = (await stub.GetStatus(pb.GetStatusRequest())).engines
            if not engines or engines[0].state == pb.ENGINE_STATE_UNLOADING:
                break
    progress = [part async for part in stub.LoadEngine(pb.LoadEngineRequest(model="tiny"))]
    await unload
    assert progress[-1].engine.state == pb.ENGINE_STATE_READY
    assert len(await generate(stub, running.submit(5))) == 5


async def test_an_unloading_goes_on_when_nobody_waits_for_it(running: Running, stub: ExecutorStub) -> None:
    """And who loads the engine meanwhile gets it, instead of the one that goes."""
    call, worker = stub.Generate(running.submit(220)), running.worker()
    assert (await call.read()).token_ids
    os.kill(worker, signal.SIGSTOP)  # so that it does not end before it has been looked at
    unload = stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=running.engine_id, drain={"seconds": 60}))
    async with asyncio.timeout(60):
        while (await stub.GetStatus(pb.GetStatusRequest())).engines[0].state != pb.ENGINE_STATE_UNLOADING:
            pass
    unload.cancel()
    assert "is being unloaded" in (await error_of(stub.Generate(running.submit(5)))).message
    loading = asyncio.ensure_future(stub.LoadEngine(pb.LoadEngineRequest(model="tiny")).read())
    os.kill(worker, signal.SIGCONT)
    while (output := await call.read()) is not grpc.aio.EOF:
        last = output
    assert last.finish.reason == FinishReason.FINISH_REASON_LENGTH
    await loading
    assert [part async for part in stub.LoadEngine(pb.LoadEngineRequest(model="tiny"))][-1].HasField("engine")
    assert running.worker() != worker
    assert len(await generate(stub, running.submit(5))) == 5


async def test_a_load_can_be_called_off(running: Running, stub: ExecutorStub) -> None:
    await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=running.engine_id))
    loading = stub.LoadEngine(pb.LoadEngineRequest(model="tiny"))
    await loading.read()
    await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=running.engine_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await loading.read() is not grpc.aio.EOF:
            pass
        raise AssertionError(f"the load ended with {await loading.code()}")
    assert from_rpc_error(caught.value).reason == "ENGINE_UNLOADED"
    assert not (await stub.GetStatus(pb.GetStatusRequest())).engines
    assert [part async for part in stub.LoadEngine(pb.LoadEngineRequest(model="tiny"))][-1].HasField("engine")


async def test_an_engine_whose_worker_died_comes_back_when_the_store_does(running: Running, stub: ExecutorStub) -> None:
    manifest = Path(running.store) / "engines" / f"{running.engine_id}.json"
    manifest.rename(manifest.with_suffix(".away"))
    os.kill(running.worker(), signal.SIGKILL)
    for _ in range(600):
        if "cannot be loaded again" in running.service.log.read_text():
            break
        await asyncio.sleep(0.1)
    assert "cannot be loaded again: no engine" in running.service.log.read_text()
    manifest.with_suffix(".away").rename(manifest)
    await ready(stub)
    assert len(await generate(stub, running.submit(5))) == 5


async def test_a_killed_worker_ends_its_streams_and_comes_back(running: Running, stub: ExecutorStub) -> None:
    call = aiter(stub.Generate(running.submit(220)))
    await anext(call)
    killed = time.monotonic()
    os.kill(running.worker(), signal.SIGKILL)
    error = await error_of(call)
    assert (error.code, error.reason) == (14, "ENGINE_LOST") and "SIGKILL" in error.message
    assert time.monotonic() - killed < 30
    await ready(stub)
    assert len(await generate(stub, running.submit(5))) == 5


async def test_an_engine_can_be_unloaded_and_loaded_again(running: Running, stub: ExecutorStub) -> None:
    call = aiter(stub.Generate(running.submit(220)))
    await anext(call)
    await stub.UnloadEngine(pb.UnloadEngineRequest(engine_id=running.engine_id))
    assert (await error_of(call)).reason == "ENGINE_UNLOADED"
    assert not (await stub.GetStatus(pb.GetStatusRequest())).engines
    progress = [part async for part in stub.LoadEngine(pb.LoadEngineRequest(model="tiny"))]
    assert progress[-1].engine.state == pb.ENGINE_STATE_READY
    assert len(await generate(stub, running.submit(5))) == 5


def test_a_killed_front_leaves_no_worker(running: Running) -> None:
    """The last test of this module: it ends the service."""
    worker = running.worker()
    os.kill(running.service.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_a_taken_port_and_an_unknown_engine_are_one_line_each(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(AssertionError, match="no model 'nope'; there are: none yet"),
        service("executor_svc", log, "--store", str(tmp_path), "--engine", "nope"),
    ):
        pass
    assert "Traceback" not in log.read_text()

"""Which executor a request goes to, and the links under it."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import grpc
from gateway_harness import DirectoryStore, cluster, collect, eventually, failure, publish
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_executor import EOS, MockExecutor

from gateway.link import Link, View
from gateway.router import least_loaded
from protos.v1.executor_pb2 import EngineLoad, StepOutput

VIEWS = st.builds(View, st.just("a:1"), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3))


@settings(deadline=None)
@given(st.lists(VIEWS))
def test_the_least_loaded_of_the_able(views: list[View]) -> None:
    place = least_loaded(views)
    able = [view for view in views if view.connected and view.ready]
    if place is None:
        assert not able
    else:
        assert views[place] in able
        assert all((views[place].requests, views[place].queued_tokens) <= (v.requests, v.queued_tokens) for v in able)


async def test_requests_spread_and_reported_load_counts(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        first, second = c.executors
        calls = [c.generate() for _ in range(6)]
        submits = [await executor.submitted() for executor in (first, second) for _ in range(3)]
        assert first.submits.empty() and second.submits.empty()
        load = EngineLoad(engine_id=c.engine_id, running=2, waiting=7)
        first.send(StepOutput(load=load))  # other gateways' requests
        link = c.router._links[0]
        await eventually(lambda: link.view(c.engine_id).requests == 9)
        calls += [c.generate() for _ in range(3)]
        submits += [await second.submitted() for _ in range(3)]
        assert first.submits.empty()
        for executor, mine in ((first, submits[:3]), (second, submits[3:])):
            for submit in mine:
                executor.tokens(submit.handle, [5], EOS)
        for call in calls:
            assert (await collect(call))[1] == [5]


async def test_an_executor_without_the_engine_gets_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        first, second = c.executors
        first.ready = []
        await c.ready(1)  # with the next status
        calls = [c.generate() for _ in range(3)]
        for _ in calls:
            await second.submitted()
        assert first.submits.empty()
        for call in calls:
            call.cancel()


async def test_an_engine_that_was_loaded_just_now_serves_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.link._POLL_INTERVAL", 60.0)
    async with cluster(tmp_path) as c:
        (executor,) = c.executors
        loaded, executor.ready = executor.ready, []
        await c.router._links[0].look()
        assert c.router.ready(c.engine_id) == 0
        executor.ready = loaded
        call = c.generate()
        executor.tokens((await executor.submitted()).handle, [5], EOS)
        assert (await collect(call))[1] == [5]


async def test_an_executor_that_goes_and_comes_back(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=2) as c:
        first, second = c.executors
        await first.stop()
        await c.ready(1)
        call = c.generate()
        second.tokens((await second.submitted()).handle, [5], EOS)
        await collect(call)
        await second.stop()
        await c.ready(0)
        error = await failure(c.generate())
        assert error.reason == "ENGINE_NOT_READY"
        assert "0 of 2 executors are connected" in error.message
        await first.start()
        await c.ready(1)
        call = c.generate()
        first.tokens((await first.submitted()).handle, [6], EOS)
        assert (await collect(call))[1] == [6]


async def test_an_executor_that_does_not_answer_gets_nothing_new(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.link._POLL_INTERVAL", 0.05)
    async with cluster(tmp_path) as c:
        running = c.generate()
        handle = (await c.executor.submitted()).handle
        for code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
            c.executor.status_fails = code
            await c.ready(0)
            assert (await failure(c.generate())).reason == "ENGINE_NOT_READY"
            c.executor.status_fails = None
            await c.ready(1)
        c.executor.tokens(handle, [5], EOS)  # what runs runs on
        assert (await collect(running))[1] == [5]
        assert c.executor.streams == 1


async def test_a_link_to_nobody_waits(caplog) -> None:
    link = Link("127.0.0.1:1")
    task = asyncio.create_task(link.run())
    await asyncio.sleep(0.5)
    assert not task.done() and not link.view("x").connected
    assert len([record for record in caplog.records if "127.0.0.1:1" in record.message]) == 1  # told once
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_process_starts_before_its_executors_and_ends_on_sigterm(tmp_path: Path) -> None:
    engine_id = publish(DirectoryStore(tmp_path), "demo")
    executor = MockExecutor(engine_id)
    await executor.start()
    await executor.stop()  # its port is free now, and known
    arguments = ["--store", str(tmp_path), "--executor", executor.address, "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    assert line.startswith("enginehouse gateway listening on 127.0.0.1:")
    await executor.start()
    await eventually(lambda: executor.streams == 1, 10)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    await executor.stop()


def test_wrong_arguments_and_heavy_imports(tmp_path: Path) -> None:
    def gateway(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)

    wrong = gateway("-m", "gateway", "--store", str(tmp_path), "--executor", "nowhere")
    assert wrong.returncode == 2 and "'nowhere' is not HOST:PORT" in wrong.stderr
    wrong = gateway("-m", "gateway", "--store", "ftp://x", "--executor", "a:1")
    assert wrong.returncode == 1 and wrong.stderr.startswith("gateway: ") and "Traceback" not in wrong.stderr
    code = "import sys, gateway.__main__; print({'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    assert gateway("-c", code).stdout.strip() == "set()"

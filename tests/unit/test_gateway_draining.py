"""An executor that is being stopped gets nothing new, and ends what it has."""

from pathlib import Path

import pytest
from gateway_harness import cluster, collect, eventually
from mock_executor import EOS

from gateway.link import Link
from protos.v1.executor_pb2 import ENGINE_STATE_READY, EngineStatus, ExecutorStatus, StepOutput


async def test_an_executor_that_says_so_gets_nothing_new_and_ends_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.link._POLL_INTERVAL", 60.0)
    async with cluster(tmp_path, executors=2) as c:
        begun = c.generate()
        await eventually(lambda: any(executor.submits.qsize() for executor in c.executors), 60)
        first, second = sorted(c.executors, key=lambda executor: -executor.submits.qsize())
        submit = await first.submitted()
        first.send(StepOutput(draining=True))
        await eventually(lambda: c.router.ready(c.engine_id) == 1)
        later = [c.generate() for _ in range(3)]
        for _ in later:
            second.tokens((await second.submitted()).handle, [6], EOS)
        assert first.submits.empty()
        first.tokens(submit.handle, [5], EOS)
        assert (await collect(begun))[1] == [5]
        assert [(await collect(call))[1] for call in later] == [[6]] * 3


async def test_a_status_that_says_so_counts_as_well() -> None:
    link = Link("127.0.0.1:1")
    engines = [EngineStatus(engine_id="e", state=ENGINE_STATE_READY)]
    for draining in (False, True):
        link._note(ExecutorStatus(engines=engines, draining=draining))
        assert link.view("e").ready is not draining
    await link._channel.close()

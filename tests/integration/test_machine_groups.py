"""An engine whose ranks are divided among machines, one of which is killed and comes back."""

import time
from pathlib import Path

import grpc

from builder_svc.build_config import BuildConfig
from builder_svc.pipeline import build
from engine.directory import DirectoryStore
from protos.v1.executor_pb2_grpc import ExecutorStub
from tests.integration.llm_harness import gone, workers
from tests.integration.machines import (
    LIMITS,
    WITHIN,
    begun,
    kill,
    loaded,
    lost,
    one_rank,
    ready,
    says,
    tokens,
    where_to_join,
)
from tests.integration.services import service


async def test_a_machine_that_is_killed_ends_the_group_which_comes_back_with_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    expected = one_rank(checkpoint, store)
    engine_id = build(checkpoint, BuildConfig(tp_size=2, **LIMITS), store=DirectoryStore(store)).manifest.engine_id
    here = ("--store", str(store))
    leading = ("--machines", "2", "--machines-port", "0", "--join-timeout", "1")
    with service("executor_svc", tmp_path / "leader", *here, *leading) as leader:
        joins = ("--join", where_to_join(leader))
        async with grpc.aio.insecure_channel(leader.address) as channel:
            stub = ExecutorStub(channel)
            with service("executor_svc", tmp_path / "first", *here, *joins) as member:
                await loaded(stub, engine_id)
                ranks = [*workers(leader.process.pid), *workers(member.process.pid)]
                assert len(ranks) == 2, "each has one"
                assert await tokens(stub, engine_id) == expected
                call = await begun(stub, engine_id)
                killed = time.monotonic()
                kill(member)
                await lost(call)
                assert time.monotonic() - killed < WITHIN and gone(ranks, WITHIN)
            assert says(leader.log, "of 2 machines, these have not joined"), "it tries again, and says what is missing"
            with service("executor_svc", tmp_path / "second", *here, *joins):
                await ready(stub)  # nobody has to say it
                assert await tokens(stub, engine_id) == expected

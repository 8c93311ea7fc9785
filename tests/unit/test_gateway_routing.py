"""Which executor a request goes to, and the links under it."""

import asyncio
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc
from gateway_harness import DirectoryStore, cluster, collect, eventually, failure, publish
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_executor import EOS, MockExecutor

from gateway.link import Link
from gateway.prefixes import BLOCK_TOKENS, Chain, Holder, PrefixIndex
from gateway.roster import Roster
from gateway.routing import Ask, Policy, View
from protos.v1.common_pb2 import TokenIds
from protos.v1.executor_pb2 import EngineLoad, StepOutput

VIEWS = st.builds(
    View,
    st.sampled_from([f"a:{port}" for port in range(9)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 300),
    free_kv=st.floats(0, 1),
    trusted=st.booleans(),
)


@settings(deadline=None)
@given(st.lists(VIEWS), st.sets(st.sampled_from([f"a:{port}" for port in range(9)])))
def test_only_the_able_are_taken_and_the_untried_first(views: list[View], avoid: set[str]) -> None:
    place = Policy().choose(Ask(100, avoid=avoid), views)
    able = [view for view in views if view.connected and view.ready and view.trusted]
    able = [view for view in able if view.address not in avoid] or able
    assert (views[place] in able) if place is not None else not able


@settings(deadline=None)
@given(st.lists(VIEWS, min_size=1), st.integers(0, 5000), st.data())
def test_scores_are_from_0_to_1(views: list[View], tokens: int, data: st.DataObject) -> None:
    views = [replace(view, holder=Holder(view.address)) for view in views]
    cached = {view.holder: data.draw(st.integers(0, 10_000)) for view in views if view.holder}
    for score in Policy().scores:
        values, worth = score(Ask(tokens, cached), views)
        assert len(values) == len(views) and all(0 <= value <= 1 for value in values) and worth >= 0


def ready(address: str, requests: int = 0, queued: int = 0, **more: object) -> View:
    return View(address, True, True, requests, queued, holder=Holder(address), **more)  # type: ignore[arg-type]


def chosen(views: list[View], tokens: int = 1000, cached: dict[int, int] | None = None) -> Counter[int]:
    """How often each is taken; `cached`: tokens by place."""
    held = {views[place].holder: count for place, count in (cached or {}).items()}
    return Counter(Policy().choose(Ask(tokens, held), views) for _ in range(300))  # type: ignore[arg-type,misc]


def test_what_a_choice_weighs() -> None:
    assert chosen([ready("a", 3, 500), ready("b", 2, 500)]).keys() == {1}
    assert chosen([ready("a", 2, 500), ready("b", 2, 400)]).keys() == {1}
    assert chosen([ready("a", 5), ready("b")], cached={0: 900}).keys() == {0}  # five requests are less than 900 tokens
    assert chosen([ready("a", 5, 2000), ready("b")], cached={0: 900}).keys() == {1}
    assert chosen([ready("a"), ready("b")], cached={0: 500, 1: 600}).keys() == {1}
    assert chosen([ready("a", free_kv=0.01), ready("b", 1)]).keys() == {1}


def test_ties_and_what_others_have_sent_are_chance() -> None:
    assert chosen([ready(str(n)) for n in range(3)]).keys() == {0, 1, 2}
    idlest = [ready("a", 10, others=10), *(ready(str(n), 12, others=12) for n in range(3))]
    assert chosen(idlest).keys() == {0, 1, 2, 3}  # a view that all other gateways have, too
    assert chosen([replace(view, others=0) for view in idlest]).keys() == {0}
    assert chosen([ready("a", 10, others=10), *(ready(str(n), 40, others=40) for n in range(3))]).keys() == {0}


def test_a_roster() -> None:
    numbers, roster, expected = random.Random(1), Roster[int](), dict[int, set[str]]()
    for _ in range(2000):
        member, engines = numbers.randrange(9), set(numbers.sample("abcd", numbers.randrange(4)))
        roster.update(member, engines)
        expected[member] = engines
        for engine in "abcd":
            found = roster.ready(engine)
            assert len(found) == len(set(found))
            assert set(found) == {which for which, has in expected.items() if engine in has}


def chain(*token_ids: int, tenant: str = "") -> Chain:
    """Each id stands for a block."""
    return Chain("e", tenant, [token_id for token_id in token_ids for _ in range(BLOCK_TOKENS)])


def test_prefixes_are_found_as_far_as_they_are_alike() -> None:
    index, a, b = PrefixIndex(), Holder("a"), Holder("b")
    index.add(chain(1, 2, 3), a)
    index.add(chain(1, 2, 4), b)
    assert index.match(chain(1, 2, 3, 5)) == {a: 3 * BLOCK_TOKENS, b: 2 * BLOCK_TOKENS}
    assert index.match(chain(2, 3)) == {} and index.match(chain(1, tenant="else")) == {}
    assert index.match(Chain("other", "", [1] * BLOCK_TOKENS)) == {}
    assert index.match(Chain("e", "", [1] * (BLOCK_TOKENS - 1))) == {}


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=400), st.lists(st.integers(0, 100), max_size=9))
def test_a_chain_does_not_depend_on_how_it_grows(token_ids: list[int], cuts: list[int]) -> None:
    whole, grown = Chain("e", "t", token_ids), Chain("e", "t")
    rest = token_ids
    for cut in cuts:
        grown.extend(rest[:cut])
        rest = rest[cut:]
        copy = grown.copy()
        copy.extend([9] * BLOCK_TOKENS)  # changes nothing of the other
    grown.extend(rest)
    assert grown.hashes == whole.hashes and len(whole.hashes) == len(token_ids) // BLOCK_TOKENS


def test_long_texts_are_looked_at_as_far_as_it_pays() -> None:
    long = Chain("e", "", range(200_000))
    assert len(long.hashes) == 512
    long.extend(range(1000))
    assert len(long.hashes) == 512 and long.num_tokens == 201_000


def test_a_miss_tells_of_all_that_was_used_before_it() -> None:
    index, holder = PrefixIndex(), Holder("a")
    for number in (1, 2, 3):
        index.add(chain(number, 9, 9), holder)
    before = index.add(chain(2, 9, 9, 8), holder)
    assert len(before) == 3
    index.found(holder, before, 3 * BLOCK_TOKENS - 16)  # an executor computes one block of its own at least
    assert index.match(chain(1, 9, 9)) == {holder: 3 * BLOCK_TOKENS}
    index.found(holder, before, 0)
    assert index.match(chain(1, 9, 9)) == {}  # used before what was missed
    assert index.match(chain(3, 9, 9)) == {holder: 3 * BLOCK_TOKENS}
    assert index.match(chain(2, 9, 9, 8)) == {holder: 4 * BLOCK_TOKENS}  # computed again by now


def test_an_index_has_bounds() -> None:
    index = PrefixIndex(most_blocks=100)
    holders = [Holder(str(number)) for number in range(20)]
    for number in range(300):
        index.add(chain(7, number, 0), holders[number % 20])
    assert len(index) == 100
    found = index.match(chain(7, 299, 0))
    assert found[holders[19]] == 3 * BLOCK_TOKENS  # what was used last
    assert set(found) == set(holders[-8:])  # the last that used the first block
    assert index.match(chain(7, 0, 0)).keys() == set(holders[-8:])


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


async def test_a_conversation_stays_where_its_prefix_is(tmp_path: Path) -> None:
    async with cluster(tmp_path, executors=3) as c:
        homes, prompts = dict[int, MockExecutor](), {number: [number + 2] * 300 for number in range(6)}
        for turn in range(3):
            for number, prompt in prompts.items():
                call = c.generate(token_ids=TokenIds(ids=prompt))
                await eventually(lambda: any(executor.submits.qsize() for executor in c.executors), 60)
                executor = next(executor for executor in c.executors if executor.submits.qsize())
                assert homes.setdefault(number, executor) is executor
                handle = executor.submits.get_nowait().handle
                executor.begin(handle, cached_tokens=len(prompt) - 1 if turn else 0)
                executor.tokens(handle, answer := [60 + turn] * 200, EOS)
                await collect(call)
                prompts[number] = prompt + answer
        # What an executor had cached is gone with it, and it is not looked for there any more.
        link = next(link for link in c.router.links if link.address == homes[0].address)
        held = link.view(c.engine_id).holder
        assert c.router.prefixes.match(Chain(c.engine_id, "", prompts[0]))[held] == len(prompts[0]) // 64 * 64
        homes[0].hang_up()
        await eventually(lambda: link.view(c.engine_id).holder is not held)


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

    def told() -> int:
        return len([record for record in caplog.records if "127.0.0.1:1" in record.message])

    await eventually(lambda: told() > 0)
    await asyncio.sleep(0.5)
    assert not task.done() and not link.view("x").connected
    assert told() == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_process_starts_before_its_executors_and_ends_on_sigterm(tmp_path: Path) -> None:
    engine_id = publish(DirectoryStore(tmp_path), "demo")
    executor = MockExecutor(engine_id)
    arguments = ["--store", str(tmp_path), "--executor", executor.address, "--port", "0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    assert line.startswith("enginehouse gateway listening on 127.0.0.1:")
    await executor.start()
    await eventually(lambda: executor.streams == 1)
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

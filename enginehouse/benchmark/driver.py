"""Asks a gateway, in a closed loop (so many requests at a time) or an open one (requests come whether it is busy or not)."""

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import aclosing
from itertools import islice
from typing import Any

from engine.errors import EnginehouseError
from enginehouse.benchmark.results import Point, Record, summarize
from enginehouse.benchmark.workload import Ask, Workload
from enginehouse.client import GatewayClient
from protos.v1.common_pb2 import SamplingParams, StoppingCriteria

Progress = Callable[[int, int], None]
"""Called with (requests that have ended, requests in all)."""


class Driver:
    """One model at one gateway.

    Args:
        ignore_eos: generate as many tokens as were asked for, whatever the model says.
        temperature: 0 is greedy.
    """

    def __init__(
        self, gateway: GatewayClient, model: str, workload: Workload, *, ignore_eos: bool, temperature: float
    ) -> None:
        self._gateway = gateway
        self._model = model
        self._workload = workload
        self._ignore_eos = ignore_eos
        self._sampling = SamplingParams(temperature=temperature)

    async def warm_up(self, count: int) -> None:
        """Requests that are not measured, one after another. Raises what one of them fails with."""
        for ask in islice(self._workload.asks("warmup"), count):
            record = Record(due=time.perf_counter())
            await self._stream(ask, record)

    async def closed(self, concurrency: int, count: int, progress: Progress) -> Point:
        """`count` requests, of which `concurrency` run at any time.

        Cancelled, it ends those that run and returns what has been measured: look at `Point.interrupted`.
        """
        records: list[Record] = []
        asks = islice(self._workload.asks(f"concurrency {concurrency}"), count)

        async def worker() -> None:
            for ask in asks:  # all workers take from the same iterator
                record = Record(due=time.perf_counter())
                records.append(record)
                await self._request(ask, record)
                progress(_ended(records), count)

        cpu = time.process_time()
        workers = (worker() for _ in range(min(concurrency, count)))
        await _all_or_cut(_ended_all([asyncio.create_task(one) for one in workers]))
        return summarize(records, concurrency=concurrency, wanted=count, cpu_seconds=time.process_time() - cpu)

    async def open(self, rate: float, count: int, progress: Progress) -> Point:
        """`count` requests that begin at random times, `rate` a second on average. Cancelled, as `closed`."""
        label = f"rate {rate:g}"
        records: list[Record] = []

        async def request(ask: Ask, at: float) -> None:
            # From the time when it was due: a client that is late must not make the service look fast.
            record = Record(due=at, late=max(0.0, time.perf_counter() - at))
            records.append(record)
            await self._request(ask, record)
            progress(_ended(records), count)

        cpu, began = time.process_time(), time.perf_counter()
        arrivals = islice(self._workload.arrivals(rate, label), count)
        running: set[asyncio.Task[None]] = set()

        async def begin_all() -> None:
            try:
                for at, ask in zip(arrivals, self._workload.asks(label), strict=False):
                    await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                    task = asyncio.create_task(request(ask, began + at))
                    running.add(task)
                    task.add_done_callback(running.discard)
            except asyncio.CancelledError:
                for task in running:
                    task.cancel()
                raise
            finally:
                await _ended_all(tuple(running))

        await _all_or_cut(begin_all())
        return summarize(records, rate=rate, wanted=count, cpu_seconds=time.process_time() - cpu)

    async def _request(self, ask: Ask, record: Record) -> None:
        """One request, whose error is part of the record."""
        try:
            await self._stream(ask, record)
        except EnginehouseError as error:
            record.failure = (error.reason, error.message)
        except asyncio.CancelledError:
            record.cut_off = True
            raise
        finally:
            record.ended = time.perf_counter()

    async def _stream(self, ask: Ask, record: Record) -> None:
        stopping = StoppingCriteria(max_tokens=ask.max_tokens, ignore_eos=self._ignore_eos)
        finished = False
        responses = self._gateway.generate(self._model, ask.prompt, sampling=self._sampling, stopping=stopping)
        async with aclosing(responses):
            async for response in responses:
                record.arrived(time.perf_counter(), len(response.token_ids))
                if response.HasField("usage"):
                    record.prompt_tokens = response.usage.prompt_tokens
                    record.cached_tokens = response.usage.cached_tokens
                finished = finished or response.HasField("finish")
        if not finished:
            raise EnginehouseError("the stream ended without a finish", reason="NO_FINISH")


def _ended(records: list[Record]) -> int:
    return sum(record.ended is not None for record in records)


async def _all_or_cut(work: Coroutine[Any, Any, None]) -> None:
    """Waits for it. Cancelled, cancels it, waits for its end and returns."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _ended_all(tasks: Collection[asyncio.Task[None]]) -> None:
    """Waits for tasks; when one fails, or this is cancelled, all of them have ended on return."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

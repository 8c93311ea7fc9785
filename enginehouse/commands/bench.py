"""`enginehouse bench`: throughput and latency of a running cluster, through its gateway."""

import asyncio
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from enginehouse.benchmark import plot as drawing
from enginehouse.benchmark.driver import Driver
from enginehouse.benchmark.results import Distribution, Point
from enginehouse.benchmark.workload import SAMPLE_TEXT, Length, Prompt, Workload, read_prompts
from enginehouse.client import GatewayClient
from enginehouse.commands.generate import only_model
from enginehouse.progress import Bars, stderr
from enginehouse.tables import print_json
from protos.v1.gateway_pb2 import Model

_LATE = 0.01  # seconds by which requests at a rate may begin too late before that is worth a warning


@dataclass(frozen=True)
class Settings:
    """What a person chose; `seed` None draws one."""

    requests: int
    concurrency: tuple[int, ...]
    rate: tuple[float, ...]
    input_len: Length
    output_len: Length
    shared_prefix: int
    warmup: int
    seed: int | None
    ignore_eos: bool
    temperature: float
    prompts: Path | None = None

    def to_json(self, seed: int) -> dict[str, Any]:
        """For programs, with the seed that was used."""
        chosen = asdict(self) | {"seed": seed, "prompts": str(self.prompts) if self.prompts else None}
        return chosen | {"input_len": str(self.input_len), "output_len": str(self.output_len)}


def run(
    settings: Settings, *, model: str | None, gateway: str, as_json: bool, out: Path | None, plot: Path | None
) -> int:
    """Measures, prints and writes; returns the exit status: 130 after Ctrl-C, 1 if no request of a load was completed."""
    prompts = read_prompts(settings.prompts) if settings.prompts else []
    if plot:
        drawing.check_available()
    for path in (out, plot):
        _check_writable(path)
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    bench = _Bench(settings, seed, prompts, stderr())
    asyncio.run(bench.run(gateway, model))
    told = {
        "model": bench.model.name,
        "engine_id": bench.model.engine_id,
        "gateway": gateway,
        "started": bench.started,
        "settings": settings.to_json(seed),
        "points": [point.to_json() for point in bench.points],
        "interrupted": bench.interrupted,
    }
    if as_json:
        print_json(told)
    elif bench.points:
        _say(bench.points)
    if out:
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if plot and bench.points:
        title = f"{bench.model.name}: {settings.input_len} tokens in, {settings.output_len} out"
        drawing.plot(bench.points, title if not prompts else f"{bench.model.name}: {settings.prompts}", plot)
    _warn(bench.points, settings, stderr())
    if bench.interrupted:
        return 130
    return 1 if any(not point.completed for point in bench.points) else 0


class _Bench:
    """Attributes: model, started, and the points so far; they stay when it is interrupted."""

    def __init__(self, settings: Settings, seed: int, prompts: Sequence[Prompt], console: Console) -> None:
        self._settings = settings
        self._seed = seed
        self._prompts = prompts
        self._console = console
        self.model = Model()
        self.started = ""
        self.points: list[Point] = []
        self.interrupted = False

    async def run(self, address: str, wanted: str | None) -> None:
        """Cancelled once it measures, it ends early and returns."""
        settings = self._settings
        async with GatewayClient(address) as gateway:
            self.model = _choose(await gateway.models(), wanted)
            workload = await self._workload(gateway)
            driver = Driver(
                gateway,
                self.model.name,
                workload,
                ignore_eos=settings.ignore_eos,
                temperature=settings.temperature,
            )
            self.started = datetime.now(UTC).isoformat(timespec="seconds")
            with Bars(self._console, self.model.name) as bars:
                await driver.warm_up(settings.warmup)
                await self._measure(driver, bars)

    async def _measure(self, driver: Driver, bars: Bars) -> None:
        settings = self._settings
        count = settings.requests

        def bar(label: str) -> Any:
            return lambda done, total: bars.update(label, done, total, "requests")

        for load in settings.rate or settings.concurrency:
            if settings.rate:
                point = await driver.open(load, count, bar(f"rate {load:g}/s"))
            else:
                point = await driver.closed(int(load), count, bar(f"concurrency {load:g}"))
            if point.requests:
                self.points.append(point)
            if point.interrupted:
                self.interrupted = True
                return

    async def _workload(self, gateway: GatewayClient) -> Workload:
        settings, ids = self._settings, []
        if not self._prompts:
            longest, most = self.model.max_seq_len, settings.input_len.high + settings.output_len.high
            if longest and most > longest:
                raise InvalidArgument(
                    f"--input-len {settings.input_len} and --output-len {settings.output_len}: {self.model.name} takes "
                    f"{longest} tokens of prompt and completion together",
                    reason="CONTEXT_TOO_LONG",
                )
            ids = await self._ids(gateway)
            if len(ids) < 2:
                raise FailedPrecondition(
                    f"the tokenizer of {self.model.name} knows too few of our characters to make prompts: give some with "
                    "--prompts FILE",
                    reason="NO_SYNTHETIC_PROMPTS",
                )
        return Workload(self._seed, settings.input_len, settings.output_len, ids, settings.shared_prefix, self._prompts)

    async def _ids(self, gateway: GatewayClient) -> list[int]:
        """Token ids to make prompts of: of a text, or any where the model has no tokenizer."""
        if self.model.vocab_size and not self.model.has_tokenizer:
            return list(range(self.model.vocab_size))
        return sorted(set(await gateway.tokenize(self.model.name, SAMPLE_TEXT, special_tokens=False)))


def _choose(models: list[Model], wanted: str | None) -> Model:
    if wanted is None:
        return only_model(models)
    for model in models:
        if model.name == wanted:
            return model
    names = ", ".join(model.name for model in models) or "none"
    raise NotFound(f"no model {wanted!r}; there are: {names}", reason="MODEL_NOT_FOUND")


def _check_writable(path: Path | None) -> None:
    """An error now, not when all has been measured. Raises FailedPrecondition."""
    if path is None:
        return
    place = path if path.exists() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise FailedPrecondition(f"cannot write {path}: choose another file", reason="FILE_NOT_WRITABLE")


def _say(points: Sequence[Point]) -> None:
    console = Console(highlight=False)
    load = "concurrency" if points[0].concurrency else "requests/s offered"
    throughput = Table(title="Throughput", title_justify="left")
    for name in (load, "completed", "failed", "seconds", "requests/s", "output tokens/s"):
        throughput.add_column(name, justify="right")
    for point in points:
        throughput.add_row(
            f"{point.concurrency or point.rate:g}",
            str(point.completed),
            str(point.failed),
            f"{point.seconds:.2f}",
            f"{point.requests_per_second:.2f}",
            f"{point.tokens_per_second:.1f}",
        )
    latency = Table(title="Latency, ms", title_justify="left")
    latency.add_column(load, justify="right")
    latency.add_column("of")
    for name in ("mean", "median", "p90", "p99"):
        latency.add_column(name, justify="right")
    for point in points:
        rows = {
            "first token": point.ttft,
            "next token": point.inter_token_latency,
            "whole request": point.end_to_end,
        }
        for what, values in rows.items():
            latency.add_row(f"{point.concurrency or point.rate:g}", what, *_cells(values))
        latency.add_section()
    console.print(throughput)
    console.print(latency)


def _cells(values: Distribution) -> list[str]:
    return ["-" if value is None else f"{value * 1e3:.2f}" for value in vars(values).values()]


def _warn(points: Sequence[Point], settings: Settings, console: Console) -> None:
    """What a person must know before believing the numbers."""
    for point in points:
        for reason, (count, message) in point.failures.items():
            console.print(f"{point.label}: {count} failed with {reason}: {message}")
        if point.cut_off:
            console.print(f"{point.label}: interrupted, {point.cut_off} requests were cut off")
        if point.saturated:
            console.print(
                f"warning: {point.label}: the client used {point.client_cpu:.0%} of a core, so its own pace may be what was "
                "measured: run several of them, or longer outputs and less concurrency"
            )
        if point.late > _LATE:
            console.print(
                f"warning: {point.label}: requests began up to {point.late * 1e3:.0f} ms late; latencies count from when "
                "they were due"
            )
        # the shared prefix is computed by one of them; of every other prompt the cache may hold it
        expected = settings.shared_prefix * point.requests
        if point.cached_tokens > expected:
            share = point.cached_tokens / max(1, point.prompt_tokens)
            console.print(
                f"warning: {point.label}: {share:.0%} of the prompt tokens were in the prefix cache: these prompts have been "
                "computed before (a --seed or --prompts used again), which makes the first token look fast"
            )

"""`enginehouse up`: the local cluster, with models built and loaded, until Ctrl-C or until a command has ended."""

import asyncio
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from builder_svc.checkpoint.sources import is_checkpoint
from engine import registry
from engine.backends import open_store
from engine.errors import InvalidArgument, NotFound, Unavailable
from enginehouse.client import BuilderClient, GatewayClient
from enginehouse.cluster import LocalCluster
from enginehouse.cluster_security import ClusterSecurity
from enginehouse.commands.build import Choices, default_name, same_place
from enginehouse.commands.follow import follow
from enginehouse.commands.load import load
from enginehouse.credentials import typed
from enginehouse.foreground import Signals, find_program, run_command
from enginehouse.home import DEFAULT_GATEWAY, Home
from enginehouse.progress import Bars, format_bytes, stderr
from protos.v1.gateway_pb2 import Model

_READY_TIMEOUT = 60.0  # seconds for the gateway to notice what the executors have loaded


@dataclass(frozen=True)
class Wanted:
    """A model to serve; without a checkpoint it is in the store."""

    name: str
    checkpoint: Path | None = None

    @staticmethod
    def parse(text: str) -> "Wanted":
        """NAME=CHECKPOINT, the path of a checkpoint (named like it), or a name in the store.

        A bare word is always a name, so that a folder that happens to be called like a model does not hide the model.
        """
        name, given, path = text.partition("=")
        if given:
            return Wanted(registry.check_name(name), _checkpoint(path))
        if os.sep in text or text in (".", "..") or text.startswith("~"):
            return Wanted(default_name(text), _checkpoint(text))
        return Wanted(registry.check_name(text))


def run(
    models: Sequence[str],
    command: Sequence[str],
    *,
    home: Home,
    store: str | None,
    executors: int,
    host: str,
    port: int,
    as_json: bool = False,
    metrics: bool = False,
    security: ClusterSecurity,
    http_port: int | None = None,
) -> int:
    """Runs the cluster; returns the exit status. With `as_json` a line on stdout says where it is when it serves."""
    security.check()
    wanted = [Wanted.parse(text) for text in models]
    names = [model.name for model in wanted]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidArgument(f"two models are called {min(twice)!r}: name one with NAME=CHECKPOINT")
    cluster = LocalCluster(
        home,
        store=store,
        executors=executors,
        host=host,
        port=port,
        metrics=metrics,
        security=security,
        http_port=http_port,
    )
    for model in wanted:
        if model.checkpoint is None:
            _check_known(cluster.store, model.name)  # an error now, not when all have started
    if command:
        find_program(command[0])
    with typed(security.client):
        return asyncio.run(_Up(cluster, wanted, command, stderr(), as_json).run())


class _Up:
    def __init__(
        self, cluster: LocalCluster, wanted: Sequence[Wanted], command: Sequence[str], console: Console, as_json: bool
    ) -> None:
        self._cluster = cluster
        self._wanted = wanted
        self._command = command
        self._console = console
        self._as_json = as_json
        self._serving = False

    async def run(self) -> int:
        with Signals(hurry=self._cluster.kill) as signals:
            try:
                return await self._run(signals)
            except asyncio.CancelledError:
                if signals.received is None:
                    raise
                return 0 if self._serving else 128 + signals.received

    async def _run(self, signals: Signals) -> int:
        began = time.monotonic()
        cluster, console = self._cluster, self._console
        console.print(f"Starting a builder, {_count(cluster.count, 'executor')} and a gateway in {cluster.home.root}")
        async with cluster:
            try:
                served = await cluster.guard(self._serve())
                console.print(f"Ready in {time.monotonic() - began:.1f} s.")
                if self._command:
                    console.print(f"$ {shlex.join(self._command)}")
                    status = await cluster.guard(run_command(self._command, cluster, signals))
                    if status == 0 and served:
                        self._say_what_next_after(served)
                    return status
                self._serving = True
                if self._as_json:
                    print(json.dumps(self._fields(served)), flush=True)
                self._say_what_next(served)
                await cluster.guard(_forever())
            finally:
                if not self._command:
                    console.print("Stopping...")
        return 0

    async def _serve(self) -> list[Model]:
        """Builds and loads what is wanted, and returns what the gateway then serves."""
        cluster = self._cluster
        engines = {}
        async with BuilderClient(cluster.builder) as builder:
            for model in self._wanted:
                engines[model.name] = await self._engine(builder, model)
        for name, engine_id in engines.items():
            await load(engine_id, cluster.executors, name, self._console)
        async with GatewayClient(cluster.gateway) as gateway:
            deadline = time.monotonic() + _READY_TIMEOUT
            while True:
                models = await gateway.models()
                ready = {(m.name, m.engine_id) for m in models if m.ready_executors >= len(cluster.executors)}
                if ready.issuperset(engines.items()):
                    return [model for model in models if model.name in engines]
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"the gateway does not see that the executors have loaded {', '.join(engines)}; "
                        f"see {cluster.home.logs / 'gateway.log'}"
                    )
                await asyncio.sleep(0.05)

    async def _engine(self, builder: BuilderClient, model: Wanted) -> str:
        if model.checkpoint is None:
            return registry.resolve(open_store(self._cluster.store), model.name).engine_id
        began = time.monotonic()
        with Bars(self._console, model.name) as bars:
            build = await follow(builder, Choices().spec(str(model.checkpoint)), model.name, bars, self._console)
        manifest = registry.manifest(open_store(self._cluster.store), build.engine_id)
        size = format_bytes(sum(file.size for file in manifest.files()))
        how = "is in the store already" if build.reused else f"built in {time.monotonic() - began:.1f} s"
        self._console.print(f"{model.name}: engine {build.engine_id[:12]}, {size}, {how}")
        return build.engine_id

    def _fields(self, served: Sequence[Model]) -> dict[str, object]:
        cluster = self._cluster
        return {
            "gateway": cluster.gateway,
            "builder": cluster.builder,
            "executors": cluster.executors,
            "store": cluster.store,
            "data": str(cluster.home.root),
            "pid": os.getpid(),
            "metrics": cluster.metrics,
            "http": cluster.http,
            "models": [{"name": model.name, "engine_id": model.engine_id} for model in served],
        }

    def _say_what_next(self, served: Sequence[Model]) -> None:
        cluster, say = self._cluster, self._console.print
        say(f"  gateway    {cluster.gateway}")
        if cluster.http:
            say(f"  page       {cluster.http}/  (and OpenAI's API at {cluster.http}/v1)")
        say(f"  builder    {cluster.builder}")
        say(f"  executors  {', '.join(cluster.executors)}")
        say(f"  logs       {cluster.home.logs}")
        for name, url in cluster.metrics.items():
            say(f"  metrics    {url} of {name}")
        for name, value in cluster.security.client.environment.items():
            say(f"  clients    export {name}={value}")
        if served:
            found = cluster.home == Home.find() or cluster.gateway == DEFAULT_GATEWAY
            say("Try, in another terminal:")
            self._say_commands(served, "" if found else f" --gateway {cluster.gateway}")
        else:
            known = ", ".join(registry.names(open_store(cluster.store))) or "none yet"
            say("No model is loaded: start it with NAME=CHECKPOINT, or with a name in the store")
            say(f"(there are: {known}).")
        say("Ctrl-C stops all of it.")

    def _say_what_next_after(self, served: Sequence[Model]) -> None:
        models = " ".join(model.name for model in served)
        place = same_place(self._cluster.home, self._cluster.store)
        self._console.print("\nWhat was built stays in the store. To keep a cluster running, which finds it there:")
        self._console.print(f"  enginehouse up {models}{place}")
        self._console.print("and then, in another terminal:")
        self._say_commands(served, "")

    def _say_commands(self, served: Sequence[Model], where: str) -> None:
        model = served[0]
        name = f" --model {model.name}" if len(served) > 1 else ""
        self._console.print(f'  enginehouse generate "In the beginning"{name}{where}')
        if model.has_chat_template:
            self._console.print(f"  enginehouse chat{name}{where}")
        self._console.print(f"  enginehouse models{where}")


async def _forever() -> None:
    await asyncio.Event().wait()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _check_known(store: str, name: str) -> None:
    try:
        registry.resolve(open_store(store), name)
    except NotFound as error:
        if not is_checkpoint(Path(name)):
            raise
        hint = f"{error.message}. For the checkpoint in this folder: ./{name}"
        raise NotFound(hint, reason=error.reason, metadata=error.metadata) from None


def _checkpoint(path: str) -> Path:
    checkpoint = Path(path).expanduser()
    checkpoint = checkpoint.absolute() if checkpoint.is_file() else checkpoint.resolve()
    if not path or not is_checkpoint(checkpoint):
        raise NotFound(
            f"{path or 'an empty path'} is no directory and no .gguf file: give a checkpoint in Hugging Face layout or "
            "in GGUF",
            reason="CHECKPOINT_NOT_FOUND",
        )
    return checkpoint

"""`enginehouse models`: what is served, or what a store holds."""

import asyncio
import json
from collections.abc import Iterable, Sequence

from engine import registry
from engine.backends import open_store
from enginehouse.client import GatewayClient
from enginehouse.progress import format_bytes
from protos.v1.gateway_pb2 import Model


def run_served(gateway: str, *, as_json: bool) -> None:
    """The models that a gateway knows."""
    models = asyncio.run(_served(gateway))
    if as_json:
        _print_json(
            {
                "name": model.name,
                "engine_id": model.engine_id,
                "ready_executors": model.ready_executors,
                "max_seq_len": model.max_seq_len,
                "chat": model.has_chat_template,
            }
            for model in models
        )
        return
    rows = [
        (
            model.name,
            model.engine_id[:12],
            str(model.ready_executors or "not loaded"),
            str(model.max_seq_len or ""),
            "yes" if model.has_chat_template else "no",
        )
        for model in models
    ]
    _print_table(
        ("model", "engine", "executors", "max tokens", "chat"), rows, "no models yet: enginehouse up NAME=CHECKPOINT"
    )


def run_stored(store_url: str, *, as_json: bool) -> None:
    """The names in a store, each with its newest engine."""
    store = open_store(store_url)
    found = [registry.resolve(store, name) for name in registry.names(store)]
    engines = [(record.name, registry.manifest(store, record.engine_id)) for record in found]
    if as_json:
        _print_json(
            {
                "name": name,
                "engine_id": manifest.engine_id,
                "architecture": manifest.model.architecture,
                "parameters": manifest.model.num_parameters,
                "dtype": manifest.model.dtype,
                "device": manifest.fingerprint.device,
                "size": sum(file.size for file in manifest.files()),
                "created": manifest.created,
            }
            for name, manifest in engines
        )
        return
    rows = [
        (
            name,
            manifest.engine_id[:12],
            manifest.model.architecture,
            f"{manifest.model.dtype} {manifest.fingerprint.device}",
            format_bytes(sum(file.size for file in manifest.files())),
        )
        for name, manifest in engines
    ]
    empty = f"no models in {store.url} yet: enginehouse build CHECKPOINT --store {store_url}"
    _print_table(("model", "engine", "architecture", "for", "size"), rows, empty)


async def _served(address: str) -> list[Model]:
    async with GatewayClient(address) as gateway:
        return await gateway.models()


def _print_json(items: Iterable[dict[str, object]]) -> None:
    print(json.dumps(list(items), indent=1))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    if not rows:
        print(empty)
        return
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for line in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

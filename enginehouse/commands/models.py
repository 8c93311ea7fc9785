"""`enginehouse models`: what is served, what a store holds, and what its names stand for."""

import asyncio

from engine import names, registry
from engine.backends import open_store
from engine.registry import NameRecord
from enginehouse.client import GatewayClient
from enginehouse.progress import format_bytes
from enginehouse.tables import print_json, print_table
from protos.v1.gateway_pb2 import Model


def run_served(gateway: str, *, as_json: bool) -> None:
    """The models that a gateway knows."""
    models = asyncio.run(_served(gateway))
    if as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "engine_id": model.engine_id,
                    "ready_executors": model.ready_executors,
                    "max_seq_len": model.max_seq_len,
                    "chat": model.has_chat_template,
                }
                for model in models
            ]
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
    print_table(
        ("model", "engine", "executors", "max tokens", "chat"), rows, "no models yet: enginehouse up NAME=CHECKPOINT"
    )


def run_stored(store_url: str, *, as_json: bool) -> None:
    """The names in a store, each with its newest engine."""
    store = open_store(store_url)
    engines = [(record.name, registry.manifest(store, record.engine_id)) for record in registry.named(store)]
    if as_json:
        print_json(
            [
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
            ]
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
    print_table(("model", "engine", "architecture", "for", "size"), rows, empty)


async def _served(address: str) -> list[Model]:
    async with GatewayClient(address) as gateway:
        return await gateway.models()


def set_name(name: str, engine: str, store_url: str, *, as_json: bool) -> None:
    """Gives a name to an engine."""
    store = open_store(store_url)
    registry.check_name(name)
    _say(registry.set_name(store, name, registry.find_engine(store, engine)), as_json)


def history(name: str, store_url: str, *, as_json: bool) -> None:
    """What a name has stood for, newest first."""
    store = open_store(store_url)
    records = names.history(store, name)
    if as_json:
        print_json([_described(record) for record in records])
        return
    existing = set(registry.engine_ids(store))
    rows = [
        (
            str(record.sequence),
            record.engine_id[:12] or "-",
            record.created[:19].replace("T", " ") or "-",
            "now" if record is records[0] else "" if record.engine_id in ("", *existing) else "removed",
        )
        for record in records
    ]
    print_table(("number", "engine", "since", ""), rows, "")


def rollback(name: str, sequence: int | None, store_url: str, *, as_json: bool) -> None:
    """Gives a name back to an earlier engine."""
    _say(names.rollback(open_store(store_url), name, sequence), as_json)


def rename(old: str, new: str, store_url: str, *, as_json: bool) -> None:
    """Gives a name's engine another name."""
    _say(names.rename(open_store(store_url), old, new), as_json)


def rm(name: str, store_url: str, *, as_json: bool) -> None:
    """Lets a name stand for nothing."""
    _say(names.remove_name(open_store(store_url), name), as_json)


def _say(record: NameRecord, as_json: bool) -> None:
    if as_json:
        print_json(_described(record))
    else:
        what = f"engine {record.engine_id[:12]}" if record.engine_id else "nothing"
        print(f"{record.name} stands for {what} now (number {record.sequence} of its history)")


def _described(record: NameRecord) -> dict[str, str | int]:
    return {
        "name": record.name,
        "sequence": record.sequence,
        "engine_id": record.engine_id,
        "created": record.created,
    }
